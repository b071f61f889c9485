"""Equations 11 to 13 (reference/magnitude.py) over kernels: one pass over W for the norm, one over v forward, one over dy and v
backward. Adapters of a rank above MAX_RANK, and rows of a 4-bit W that are not whole blocks, are PyTorch's over a dense W.
"""

import torch
from torch import Tensor

from ...dtypes import wide_dtype
from ...nf4 import NF4Weight
from ...plan import use_backend
from ..magnitude import Steps
from ..torch import magnitude as pytorch
from . import gpu
from .compilation import give_up
from .kernels.magnitude import magnitude
from .kernels.magnitude_backward import magnitude_backward
from .kernels.nf4_dequantize import dense
from .kernels.row_norm import refusal, row_norm
from .kernels.tiles import adjacent, readable, row_major


def why_not(t: Tensor) -> str | None:
    """None where tensors like `t` can be computed with here, otherwise the reason that they cannot."""
    return gpu.why_not(t.device, use_backend.current)


def norm(W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Equation 11 outside a layer; where its kernel does not compile, by PyTorch operations."""
    try:
        with gpu.device_of(A):
            return norm_in_a_layer(W, A, B, s, dtype)
    except Exception as error:
        give_up(A.device, error, use_backend.current)
        return pytorch.norm(W, A, B, s, dtype)


def norm_in_a_layer(W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Equation 11: n[N] = ‖W + s·B·A‖ by rows, over W as `dtype`."""
    if 0 in (*W.shape, len(A)) or wide_dtype(dtype, A.dtype) == torch.float64 or refusal(W, len(A)):
        return pytorch.norm(dense(W, dtype), A, B, s, dtype)
    return row_norm(W, adjacent(A), adjacent(B), readable(s, A.device), dtype)


def scale(v: Tensor, m: Tensor, n: Tensor, c: Tensor | None) -> Tensor:
    """Equation 12: y = u ⊙ v + c in v's dtype."""
    return magnitude(adjacent(v), adjacent(m), n, adjacent(c)) if v.numel() else torch.empty_like(v)


def scale_backward(
    dy: Tensor, v: Tensor | None, m: Tensor, n: Tensor | None, need_v: bool, need_m: bool, need_c: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Equation 13: (dv in dy's dtype, dm, dc), those that are needed."""
    if not dy.numel():
        return pytorch.scale_backward(dy, v, m, n, need_v, need_m, need_c)
    return magnitude_backward(row_major(dy), adjacent(v), adjacent(m), n, need_v, need_m, need_c)


STEPS = Steps(norm_in_a_layer, scale, scale_backward)
