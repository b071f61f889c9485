"""Equations 1 to 6 over a 4-bit weight on NVIDIA GPUs.

Few tokens take the extension's own product; otherwise W is dequantised into fresh memory, which is freed with the call, and
the Triton backend computes with it: its side kernels and the vendor's product. nf4_paths.py says which.
"""

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs
from ..torch import linear as pytorch
from ..triton import linear as triton
from ..triton import tuning
from ..triton.compilation import NothingCompilesError
from ..triton.kernels.nf4_dequantize import dense
from ..triton.kernels.project import project
from ..triton.kernels.tiles import row_major
from ..triton.planning import plan_of
from . import extension
from .extension import DTYPES, C, address, descriptor, stream
from .nf4 import dequantize

FIELDS = triton.FIELDS
notes = triton.notes


def plan(call: Call) -> Plan | str:
    """The kernels for this call, or the reason why there are none."""
    weights = [member.weight for member in call.members]
    if None in weights and call.setting == "auto":
        return "there is no 4-bit weight in this call"
    if any(weight is not None and weight.quant_type is None for weight in weights):
        return "its kernels are for 4-bit weights, those for others are Triton's"
    if len(call.members) != 1:
        return f"its kernels compute one projection a call, this one has {len(call.members)}"
    if weights[0] is not None and call.members[0].lora_A is None:
        return "there are no adapters in this call"
    if (reason := extension.why_not(call.device, call.setting)) is not None:
        return reason
    if isinstance(found := triton.plan(call), str):
        return found
    return plan_of("cuda", call, (forward, backward), (pytorch.forward, pytorch.backward))


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: y[M,N] in x's dtype, h[M,R] in A's."""
    (W, A, B, c, s, _), x = members[0], row_major(x)
    path = path_of(x, W, A)[0] if x.numel() and len(B) else "scratch"
    if path == "skinny":
        try:
            (h,) = project(x, (A.contiguous(),), triton.dropping(dropout))
            return (skinny(x, W, h, B, s, c),), (h,)
        except NothingCompilesError:
            pass  # the Triton backend notes it, and replaces its kernels
    W = W if path == "loop" else dense(W, x.dtype, dequantize)
    return triton.forward(x, (members[0]._replace(weight=W),), dropout)


def backward(
    dys: tuple[Tensor, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6 for what is wanted: one dequantised W serves dx."""
    W = dense(members[0].weight, dys[0].dtype, dequantize)
    return triton.backward(dys, x, (members[0]._replace(weight=W),), hs, dropout, needs)


def path_of(x: Tensor, W: NF4Weight, A: Tensor) -> tuple[str, str]:
    """(path, why) of the forward product."""
    return triton.nf4_path(x, W, A, lambda: skinny_refusal(x, W, A.shape[0]))


def skinny_refusal(x: Tensor, W: NF4Weight, R: int) -> str | None:
    """Why the product for few tokens cannot be used, or None."""
    if x.dtype == torch.float32:
        return "it multiplies bf16 and fp16, x is float32"
    if R > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products"
    if W.codes.data_ptr() % 8 or x.data_ptr() % 16 or _row_stride(x) % 8:
        return "codes or x's rows are not aligned to 8 and 16 bytes"
    return C.nf4_skinny_refuses(len(x), *W.shape, W.blocksize) or None


def skinny(x: Tensor, W: NF4Weight, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
    """Equation 2 for at most 16 tokens: y[M, N], rounded once."""
    y, B, h = torch.empty(len(x), W.shape[0], dtype=x.dtype, device=x.device), B.contiguous(), h.contiguous()
    c = None if c is None else c.contiguous()
    on_device = s.to(torch.float32) if isinstance(s, Tensor) and s.device == x.device else None
    C.nf4_skinny(
        descriptor(W), x.data_ptr(), _row_stride(x), h.data_ptr(), B.data_ptr(), address(c), y.data_ptr(), len(x), h.shape[1],
        1.0 if on_device is not None else float(s), address(on_device), DTYPES[x.dtype], DTYPES[h.dtype], stream(x),
    )  # fmt: skip
    return y


def _row_stride(x: Tensor) -> int:
    return x.stride(0) if len(x) > 1 else 0  # that of a single row means nothing
