"""Equations 16 and 17 (reference/eggroll.py) by PyTorch operations, in chunks of pairs: their factors are never all there."""

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...reference.eggroll import factors
from ...scratch import slices
from .engine import add_forward_product, sum_dtype, to, work_dtype

DRAWN = 1 << 20  # values of the factors of a chunk


def why_not(t: Tensor) -> str | None:
    """None: PyTorch computes with any tensor."""
    return None


def forward(x: Tensor, W: Tensor | NF4Weight, c: Tensor | None, P: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """Equation 16: y[P·M, N] in x's dtype, the low-rank term first, to which the base product is added."""
    N, K = W.shape
    work, M = work_dtype(x), len(x) // P
    y = x.new_empty(len(x), N, dtype=sum_dtype(x, W))
    of_pairs, ys = x.view(P // 2, 2 * M, K), y.view(P // 2, 2 * M, N)
    for pairs in _chunks(P, N, K, r):
        A, B = (to(t, work) for t in factors(pairs, N, K, r, seed, offset))
        h = (to(of_pairs[pairs], work) @ A.mT).mul_(s / r**0.5)
        h[:, M:].neg_()
        ys[pairs] = h @ B if c is None else torch.baddbmm(to(c, work), h, B)
    return to(add_forward_product(y, x, W), x.dtype)


def gradient(f: Tensor, N: int, K: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """Equation 17: dW[N, K] in f's dtype."""
    dW, differences = f.new_zeros(N, K), (f[::2] - f[1::2]) / (len(f) * s * r**0.5)
    for pairs in _chunks(len(f), N, K, r):
        A, B = (to(t, f.dtype) for t in factors(pairs, N, K, r, seed, offset))
        B *= differences[pairs, None, None]
        dW.addmm_(B.flatten(0, 1).T, A.flatten(0, 1))
    return dW


def _chunks(P: int, N: int, K: int, r: int) -> list[slice]:
    return slices(P // 2, max(1, DRAWN // (r * (N + K))))
