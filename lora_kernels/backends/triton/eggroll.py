"""Equations 16 and 17 (reference/eggroll.py) over kernels; where they do not compile, by PyTorch operations."""

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...plan import use_backend
from ..products import add_product
from ..torch import eggroll as pytorch
from . import gpu
from .compilation import give_up
from .kernels.eggroll import gradient as gradient_by_kernel
from .kernels.eggroll import low_rank_term
from .kernels.nf4_dequantize import dense
from .kernels.tiles import adjacent


def why_not(t: Tensor) -> str | None:
    """None where tensors like `t` can be computed with here, otherwise the reason that they cannot."""
    if t.dtype == torch.float64:
        return "it is float64, for which there are no kernels"
    return gpu.why_not(t.device, use_backend.current)


def forward(x: Tensor, W: Tensor | NF4Weight, c: Tensor | None, P: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """Equation 16: y[P·M, N] in x's dtype, the low-rank term first, to which the base product is added."""
    if 0 in (*x.shape, *W.shape):
        return pytorch.forward(x, W, c, P, s, r, seed, offset)
    try:
        with gpu.device_of(x):
            y = low_rank_term(adjacent(x), W.shape[0], adjacent(c), P, s, r, seed, offset)
            return add_product(y, x, dense(W, x.dtype).T)
    except Exception as error:
        give_up(x.device, error, use_backend.current)
        return pytorch.forward(x, W, c, P, s, r, seed, offset)


def gradient(f: Tensor, N: int, K: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """Equation 17: dW[N, K] in float32."""
    if 0 in (N, K):
        return f.new_zeros(N, K)
    try:
        with gpu.device_of(f):
            return gradient_by_kernel(f, N, K, s, r, seed, offset)
    except Exception as error:
        give_up(f.device, error, use_backend.current)
        return pytorch.gradient(f, N, K, s, r, seed, offset)
