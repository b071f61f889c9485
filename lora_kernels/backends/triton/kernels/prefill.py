"""The low-rank term of equation 2, to which the base product is then added in place."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import Launch, call, dtype_of
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
    N, R = B.shape
    key = h.device, dtype, B.dtype, R, N, dtype_of(s), dtype_of(c), tuning.precision(dtype)
    return call("prefill", low_rank_term, key, h, B, s, c)


def low_rank_term(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    N: int,
    of_s: torch.dtype | None,
    of_c: torch.dtype | None,
    precision: str,
) -> Callable[..., Tensor]:
    """run(h, B, s, c): s·h·Bᵀ + c with this tile."""
    launch = Launch(
        prefill_kernel, tile.options(), PRECISION=precision, BM=tile.rows, BN=tile.columns, BR=tuning.padded_rank(R)
    )
    column_tiles = -(-N // tile.columns)

    def run(h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
        M = h.shape[0]
        y = torch.empty(M, N, dtype=dtype, device=device)
        launch((-(-M // tile.rows), column_tiles), h, B, c, y, s, M, N, R)
        return y

    return run
