"""Equation 2 with a 4-bit W, which is decoded inside the product's loop."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....nf4 import NF4Weight
from .. import tuning
from ..launch import Launch, call, dtype_of
from ..tuning import Tile
from .lowrank_product import low_rank_tile, tile_of
from .nf4_dequantize import Kind, decoded_tile, kind, tables
from .tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["M"])
def nf4_product_kernel(
    x, codes, pairs, absmax, nested_absmax, nested_map, nested_offset, y, h, B, c, s, M, K, N, R: tl.constexpr, stride_x,
    BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[M, N] = s·h·Bᵀ + c + x·Wᵀ, a tile per program; rows of W are whole blocks."""
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BD))
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BD + tl.arange(0, BD)
    acc = low_rank_tile(h, B, c, s, None, 0, o_m, i_n * BD, M, N, R, True, False, 0, PRECISION, BM, BD, BR)
    row = tl.minimum(o_n, N - 1).to(tl.int64) * K
    SPAN: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BC else BC
    for k in range(0, K, BC):
        b_w = decoded_tile(codes, pairs, absmax, nested_absmax, nested_map, nested_offset, row, k, K, BLOCKSIZE, SPAN, BD, BC)
        b_w = b_w.to(x.dtype.element_ty)
        b_x = load_tile(x, o_m, k + tl.arange(0, BC), stride_x, M, K)
        acc = tl.dot(b_x, b_w.T, acc)
    store_tile(y, acc, o_m, o_n, N, M, N)


def refusal(x: Tensor, W: NF4Weight, R: int) -> str | None:
    """Why `product` cannot compute with these, or None."""
    if x.dtype == torch.float32:
        return "x is float32, whose products are the vendor's"
    if W.shape[1] % W.blocksize:
        return f"rows of {W.shape[1]} codes are not whole blocks of {W.blocksize}"
    if R > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products"
    return None


def product(x: Tensor, W: NF4Weight, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
    """Equation 2 in one kernel, for 16-bit x with dense rows: y[M, N]."""
    N, K = W.shape
    key = (
        x.device, x.dtype, h.dtype, h.shape[1], K, N, x.stride(0), dtype_of(s), dtype_of(c), kind(W), tuning.precision(x.dtype)
    )  # fmt: skip
    return call("nf4_product", products, key, x, W, h, B, s, c)


def products(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    K: int,
    N: int,
    stride_x: int,
    of_s: torch.dtype | None,
    of_c: torch.dtype | None,
    of_W: Kind,
    precision: str,
) -> Callable[..., Tensor]:
    """run(x, W, h, B, s, c): equation 2 with this tile, for 4-bit weights of a kind."""
    launch = Launch(
        nf4_product_kernel, tile.options() | {"enable_fp_fusion": False}, BLOCKSIZE=of_W[0], PRECISION=precision,
        BM=tile.rows, BD=tile.columns, BC=tile.depth, BR=tuning.padded_rank(R),
    )  # fmt: skip
    column_tiles = -(-N // tile.columns)

    def run(x: Tensor, W: NF4Weight, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
        M = x.shape[0]
        y = torch.empty(M, N, dtype=dtype, device=device)
        programs = -(-M // tile.rows) * column_tiles
        launch((programs, 1), x, W.codes, *tables(W), y, h, B, c, s, M, K, N, R, stride_x)
        return y

    return run
