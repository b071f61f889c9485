"""Equations 1 to 6 (reference/linear.py): h in one pass over x; y0 = s·h·Bᵀ + c, to which the vendor's product adds x·Wᵀ in
place; g, dB and dc in one pass over dy; dA and dx0 = undrop(g·A) in one pass over x, to which dy·W is added in place.
What products add to is taken in chunks of rows that L2 still holds.

Where a measurement says that it wins, the product and its low-rank term are one kernel. Adapters of a rank above MAX_RANK are
ordinary products, as PyTorch's backend takes them, over this backend's masks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...scratch import slices
from ...values import Dropout, Grads, LoRAWeights, Needs
from .. import nf4_paths
from ..products import add_product, weight_gradient
from ..torch import linear as pytorch
from ..torch.engine import ChunkMask
from . import gpu, tuning
from .compilation import give_up
from .kernels import lowrank_product, nf4_dequantize, nf4_product
from .kernels.grad_dy import grad_dy
from .kernels.grad_x import grad_x
from .kernels.mask import drop, drops
from .kernels.prefill import prefill
from .kernels.project import project
from .kernels.tiles import adjacent, row_major

FIELDS = frozenset({"weight", "lora_A", "lora_B", "bias", "scaling"})
notes = gpu.notes


def plan(call: Call) -> Plan | str:
    """The kernels for this call, or the reason why there are none."""
    if (reason := gpu.why_not(call.device, call.setting)) is not None:
        return reason
    if len(call.members) != 1:
        return f"its kernels compute one projection a call, this one has {len(call.members)}"
    if call.offset:
        return f"its masks begin at offset 0, this call's at {call.offset}"
    (member,) = call.members
    for name, tensor in (("x", call.x), ("weight", member.weight), ("lora_A", member.lora_A), ("lora_B", member.lora_B)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, for which there are no kernels"
    if call.rows >= 1 << 31:
        return f"got {call.rows} rows, kernels count them in 31 bits"
    return plan_of("triton", call, forward, backward)


def plan_of(backend: str, call: Call, forward: Callable[..., Any], backward: Callable[..., Any]) -> Plan:
    """The plan of these functions over kernels, with PyTorch's in their place where kernels do not compile."""
    why, setting = "the first that can compute this call", call.setting
    forward, backward = _or_pytorch(forward, pytorch.forward, setting), _or_pytorch(backward, pytorch.backward, setting)
    return Plan(backend, why, forward, backward)


def _or_pytorch(kernels: Callable[..., Any], otherwise: Callable[..., Any], setting: str) -> Callable[..., Any]:
    """`kernels`, or `otherwise` from the moment that some kernel has no tile left that compiles; a request by name raises."""

    def run(first: Any, *rest: Any) -> Any:
        tensor = first[0] if isinstance(first, tuple) else first  # backward's are the gradients of the results
        try:
            with gpu.device_of(tensor):
                return kernels(first, *rest)
        except Exception as error:
            give_up(tensor.device, error, setting)
            return otherwise(first, *rest)

    return run


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: y[M,N] in x's dtype, h[M,R] in A's."""
    (W, A, B, c, s), x = members[0], row_major(x)
    if 0 in (*x.shape, *B.shape):
        return pytorch.forward(x, members, dropout)
    wide = A.shape[0] > tuning.MAX_RANK
    if isinstance(W, NF4Weight) and (wide or nf4_path(x, W, A)[0] == "scratch"):
        W = dense(W, x.dtype)
    if wide:
        return pytorch.forward(x, (members[0]._replace(weight=W),), dropout, WideMask)
    dropout, s = dropping(dropout), s if s.__class__ is float else _scaling(s, x.device)
    A, B, c = adjacent(A), adjacent(B), adjacent(c)
    h = project(x, A, dropout)
    if isinstance(W, NF4Weight):
        y = nf4_product.product(x, W, h, B, s, c)
    elif tuning.dataflow(x, W, "forward") == "lowrank_product":
        y = lowrank_product.forward(x, W, h, B, s, c)
    else:
        y = prefilled(x, W, h, B, s, c)
    return (y,), (h,)


def prefilled(x: Tensor, W: Tensor, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
    """Equation 2 as y0 = s·h·Bᵀ + c, to which x·Wᵀ is added while y0 is in L2."""
    (M, _), N = x.shape, B.shape[0]
    step = tuning.chunk_rows(N, x.element_size(), tuning.gpu(x.device))
    if step >= M:
        return add_product(prefill(h, B, s, c, x.dtype), x, W.T)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    for rows in slices(M, step):
        add_product(prefill(h[rows], B, s, c, x.dtype, y[rows]), x[rows], W.T)
    return y


def backward(
    dys: tuple[Tensor, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6 for what is wanted, as backends/torch/linear.py; dc is in float32."""
    (W, A, B, _, s), (h,), (wanted,) = members[0], hs, needs.members
    dy, x = row_major(dys[0]), None if x is None else row_major(x)
    need_A, need_B, need_c = "lora_A" in wanted, "lora_B" in wanted, "bias" in wanted
    R = B.shape[1] if needs.x or need_A else h.shape[1] if need_B else 1
    W = dense(W, dy.dtype)
    if 0 in (*dy.shape, *(() if W is None else W.shape), *(() if x is None else x.shape)):
        return pytorch.backward(dys, x, (members[0]._replace(weight=W),), hs, dropout, needs)
    if R > tuning.MAX_RANK:
        return pytorch.backward((dy,), x, (members[0]._replace(weight=W),), hs, dropout, needs, WideMask)
    dropout, s = dropping(dropout), s if s.__class__ is float else _scaling(s, dy.device)
    A, B, h = adjacent(A), adjacent(B), adjacent(h)
    g, dB, dc = grad_dy(dy, h, B, s, needs.x or need_A, need_B, need_c)
    if needs.x and tuning.dataflow(dy, W, "backward") == "lowrank_product":
        _, dA = grad_x(x, g, A, dropout, dy.dtype, False, need_A)
        dx = lowrank_product.backward(dy, W, g, A, dropout)
    else:

        def add(dx: Tensor, rows: slice | None) -> Tensor:
            return add_product(dx, dy if rows is None else dy[rows], W)

        dx, dA = grad_x(x, g, A, dropout, dy.dtype, needs.x, need_A, add)
    found = {"lora_A": dA, "lora_B": dB, "bias": dc}
    if "weight" in wanted:
        found["weight"] = weight_gradient(dy, x)
    return Grads(dx, ({field: found[field] for field in wanted},))


class WideMask(ChunkMask):
    """keep by the Triton kernel, for adapters that PyTorch's backend multiplies."""

    def __init__(self, K: int, dropout: Dropout, member: int, dtype: torch.dtype):
        self.dropout = dropout

    def chunk(self, rows: slice) -> None:
        self.first_row = rows.start

    def undrop_(self, v: Tensor) -> None:
        self._drop(v, v)

    def dropped(self, v: Tensor) -> Tensor:
        return self._drop(v, torch.empty_like(v))

    def _drop(self, v: Tensor, out: Tensor) -> Tensor:
        return drop(v, self.dropout.p, self.dropout.seed, first_row=self.first_row, out=out)


def nf4_path(
    x: Tensor, W: NF4Weight, A: Tensor, skinny_refusal: Callable[[], str | None] = lambda: "it is in the CUDA extension"
) -> tuple[str, str]:
    """(path, why) of the product with a 4-bit weight, by the table of nf4_paths."""
    refusals: dict[str, Callable[[], str | None]] = {
        "skinny": skinny_refusal,
        "loop": lambda: nf4_product.refusal(x, W, A.shape[0]),
        "scratch": lambda: None,
    }
    return nf4_paths.path(len(x), tuning.gpu(x.device).capability, lambda path: refusals[path]())


def dense(
    W: Tensor | NF4Weight | None,
    dtype: torch.dtype,
    dequantize: Callable[[NF4Weight, Tensor], None] = nf4_dequantize.dequantize,
) -> Tensor | None:
    """A 4-bit weight in memory that lives for this call; others as they are."""
    if not isinstance(W, NF4Weight):
        return W
    out = torch.empty(W.shape, dtype=dtype, device=W.device)
    if out.numel():
        dequantize(W, out)
    return out


def dropping(dropout: Dropout | None) -> Dropout | None:
    """None where p is below 2^-17, and rounds to a mask of ones."""
    return dropout if dropout is not None and drops(dropout.p) else None


def _scaling(s: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor on the device is read by the kernels; anything else is a number, and its value is at hand."""
    return s if isinstance(s, Tensor) and s.device == device else float(s)
