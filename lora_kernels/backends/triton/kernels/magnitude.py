"""Equation 12 (reference/magnitude.py): y = u ⊙ v + c with u = m / n, v read and y written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, dtype_of, kept
from ..tuning import ELEMENTWISE
from .tiles import load_tile, store_tile


@triton.jit
def over(a, n):
    """a / n, 0 where n is."""
    zero = n == 0
    return tl.where(zero, 0.0, a / tl.where(zero, 1.0, n))


@triton.jit(do_not_specialize=["M"])
def magnitude_kernel(v, m, n, c, y, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """y = (m / n) ⊙ v + c, a tile per program; c may be None."""
    o_m, o_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = o_n < N
    u = over(tl.load(m + o_n, mask=inside, other=0.0).to(tl.float32), tl.load(n + o_n, mask=inside, other=0.0))
    value = load_tile(v, o_m, o_n, N, M, N).to(tl.float32) * u[None, :]
    if c is not None:
        value += tl.load(c + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
    store_tile(y, value, o_m, o_n, N, M, N)


def magnitude(v: Tensor, m: Tensor, n: Tensor, c: Tensor | None) -> Tensor:
    """(m / n) ⊙ v + c in v's dtype, for v[M, N] without gaps and n in float32."""
    M, N = v.shape
    y = torch.empty_like(v)
    grid = -(-M // ELEMENTWISE.rows), -(-N // ELEMENTWISE.columns)
    magnitudes(v.dtype, m.dtype, dtype_of(c), N)(grid, v, m, n, c, y, M, N)
    return y


@kept
def magnitudes(dtype: torch.dtype, of_m: torch.dtype, of_c: torch.dtype | None, N: int) -> Launch:
    """The launch of `magnitude` over tensors of this kind."""
    return Launch(magnitude_kernel, ELEMENTWISE.options(), BM=ELEMENTWISE.rows, BN=ELEMENTWISE.columns)
