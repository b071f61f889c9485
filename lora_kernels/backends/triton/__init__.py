"""The contract in Triton, for NVIDIA GPUs: one pass over x forward, one over dy and one over x backward.

forward.py    h, and y0 = s·h·Bᵀ + c, to which the vendor's matrix product adds x·Wᵀ in place
backward.py   g, dB, dc; dA, and dx0 = undrop(g·A), to which dy·W is added in place
nf4.py        4-bit W: dequantised in one launch into memory that lives for the call, or decoded inside the product
gemm.py       both products with their low-rank term in one kernel, where a measurement says that it wins
wide_rank.py  ranks above 64
blocks.py dropout.py tuning.py    what they share; the mask; tiles, dataflows and what did not compile
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ...nf4 import weight as format_nf4
from ...nf4.weight import NF4Weight
from ...plan import use_backend
from .. import nf4_paths as nf4_plan
from ..torch import linear as reference
from ..torch.linear import Needs
from . import backward, forward, nf4, tuning, wide_rank
from .blocks import sum_kernel

READS_NF4 = True
NF4_FORWARD = {"loop": nf4.lora_forward, "concat": nf4.concat_forward}  # by nf4_plan's paths; "scratch" is the dense forward
INTERPRETER = not isinstance(sum_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set when the kernels were defined


def why_not(x: Tensor, weight: Tensor | NF4Weight | None, lora_A: Tensor | None, lora_B: Tensor | None) -> str | None:
    """None where these kernels can compute with these tensors, otherwise the reason that they cannot."""
    if x.device.type != "cuda" or torch.version.hip is not None:
        if not INTERPRETER:
            return f"needs CUDA tensors, got {x.device.type if torch.version.hip is None else 'ROCm'}"
        if use_backend.current == "auto":
            return "Triton's interpreter is on, which is for tests: it runs only if asked for by use_backend('triton')"
    for name, tensor in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, for which there are no kernels"
    if len(x) >= 1 << 31:
        return f"got {len(x)} rows, kernels count them in 31 bits"
    capability = tuning.gpu(x.device).capability
    if capability < (8, 0):
        return "needs compute capability 8.0 or newer, got {}.{}".format(*capability)
    return tuning.broken.get(capability)


def notes(x: Tensor) -> list[str]:
    """What did not compile on x's GPU and was replaced by the next choice."""
    capability = tuning.gpu(x.device).capability
    return [f"{kernel} {tile}: {reason}" for (c, kernel, _, _, tile), reason in tuning.rejected.items() if c == capability]


def lora_forward(
    x: Tensor, W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2: y[M,N] in x's dtype, h[M,R] in A's."""
    if 0 in (*x.shape, W.shape[0]):
        return reference.lora_forward(x, W, A, B, s, c, p, seed)
    path = forward if A.shape[0] <= tuning.MAX_RANK else wide_rank
    try:
        with torch.cuda.device_of(x):
            if isinstance(W, NF4Weight) and (of_path := NF4_FORWARD.get(plan(x, W, A)[0])):
                return of_path(x, W, A, B, _scaling(s, x), c, p, seed)
            return path.lora_forward(x, _dense(W, x), A, B, _scaling(s, x), c, p, seed)
    except Exception as error:
        _give_up(x, error)
        return reference.lora_forward(x, W, A, B, s, c, p, seed)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor | NF4Weight | None,
    A: Tensor | None,
    B: Tensor | None,
    h: Tensor | None,
    s: float | Tensor,
    p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 3 to 6: those of (dx, dA, dB, dc) that `needs` names, as reference.lora_backward."""
    K = W.shape[1] if needs.dx else x.shape[1] if needs.dA else 1
    if 0 in (*dy.shape, K):
        return reference.lora_backward(dy, x, W, A, B, h, s, p, seed, needs)
    R = B.shape[1] if needs.dx or needs.dA else h.shape[1] if needs.dB else 1
    path = backward if R <= tuning.MAX_RANK else wide_rank
    try:
        with torch.cuda.device_of(dy):
            return path.lora_backward(dy, x, _dense(W, dy), A, B, h, _scaling(s, dy), p, seed, needs)
    except Exception as error:
        _give_up(dy, error)
        return reference.lora_backward(dy, x, W, A, B, h, s, p, seed, needs)


def nf4_why_not(t: Tensor) -> str | None:
    """Why 4-bit weights on t's device cannot be dequantised here, or None."""
    return why_not(t, None, None, None)


def nf4_dequantize(w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Equations 7 and 8 in one launch: W in `dtype`, into `out` if given, whose rows may lie apart."""
    try:
        with torch.cuda.device_of(w.codes):
            return nf4.dequantize(w, dtype, out)
    except Exception as error:
        _give_up(w.codes, error)
        return format_nf4.dequantize_nf4(w, dtype, out)


def plan(
    x: Tensor, W: NF4Weight, A: Tensor, skinny_refusal: Callable[[], str | None] = lambda: "it is in the CUDA extension"
) -> tuple[str, str]:
    """(path, why) of the product with a 4-bit weight, by nf4_plan's table."""
    refusals: dict[str, Callable[[], str | None]] = {
        "skinny": skinny_refusal,
        "loop": lambda: nf4.refusal(x, W, A.shape[0]),
        "concat": lambda: nf4.concat_refusal(x, A),
        "scratch": lambda: None,
    }
    return nf4_plan.path(len(x), tuning.gpu(x.device).capability, lambda path: refusals[path]())


def _dense(W: Tensor | NF4Weight | None, like: Tensor) -> Tensor | None:
    """A 4-bit weight in memory that lives for this call; others as they are."""
    return nf4.dequantize(W, like.dtype) if isinstance(W, NF4Weight) else W


def _scaling(s: float | Tensor, x: Tensor) -> float | Tensor:
    """A tensor on x's device is read by the kernels; anything else is a number, and its value is at hand."""
    return s if isinstance(s, Tensor) and s.device == x.device else float(s)


def _give_up(x: Tensor, error: Exception) -> None:
    """Where kernels do not compile, this GPU's calls go to PyTorch from now on, with this reason; any other error, or an
    explicit request, raises."""
    reason = tuning.compile_failure(error)
    if reason is None or use_backend.current == "triton":
        raise error
    tuning.broken[tuning.gpu(x.device).capability] = reason
