"""The low-rank term of equation 2, to which the base product is then added in place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..compilation import first_that_compiles
from ..tuning import Tile
from .tiles import dot, load_tile, scalar, store_tile


@triton.jit(do_not_specialize=["M"])
def prefill_kernel(
    h, B, c, y, s, M, N, R: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """y = s·h·Bᵀ + c, to which the base product is then added in place: the low-rank term is rounded once."""
    o_m, o_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    b_h, b_B = load_tile(h, o_m, o_r, R, M, R), load_tile(B, o_n, o_r, R, N, R)
    acc = scalar(s) * dot(b_h, b_B.T, None, PRECISION)
    if c is not None:
        acc += tl.load(c + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, acc, o_m, o_n, N, M, N)


def prefill(h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s·h·Bᵀ + c as [M, N] of `dtype`."""
    (M, R), N = h.shape, B.shape[0]

    def run(tile: Tile) -> Tensor:
        y = torch.empty(M, N, dtype=dtype, device=h.device)
        prefill_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns))](
            h, B, c, y, s, M, N, R, PRECISION=tuning.precision(dtype), BM=tile.rows, BN=tile.columns,
            BR=tuning.padded_rank(R), **tile.options(),
        )  # fmt: skip
        return y

    return first_that_compiles("prefill", tuning.arithmetic(dtype, B.dtype), R, h.device, run)
