"""The base product of segments over 4-bit weights of their own, which are decoded inside the product's loop.

A stack is never whole in memory, and who has no rows is not read. A tile of W is decoded again for each tile of rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....nf4 import NF4Weight
from ....values import Rows
from .. import tuning
from ..launch import Launch, kept
from ..tuning import Tile
from .nf4_dequantize import Kind, decoded_tile, kind, tables
from .segments import add_to_rows, load_rows, most_tiles, of_segments, tile_of
from .tiles import dot

# By u's bytes. Decoding bounds the loop: a decoded tile serves many rows, 8 instructions an element of u on sm_90 and 26 in
# 64x128. Triton 3.6 cannot lay out TF32's second operand, decoded by rows, for wgmma, which 64 rows or more are given.
TILES = {2: Tile(128, 64, 8, 2, 64), 4: Tile(32, 64, 4, 2, 32)}


@triton.jit(do_not_specialize=["M"])
def segment_nf4_product_kernel(
    u, codes, pairs, absmax, nested_absmax, nested_map, nested_offset, out, offsets, E, M, N, K, stride_u,
    FORWARD: tl.constexpr, BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out[j] += u[j]·W_eᵀ of the rows of each segment FORWARD, else u[j]·W_e, for W[E, N, K]; those of none stay."""
    e, o_j, inside, _ = tile_of(offsets, None, tl.program_id(0), E, M, BE, BM)
    if e >= E:
        return
    C = K if FORWARD else N
    first, d, acc = e.to(tl.int64) * N, tl.program_id(1) * BD, tl.zeros([BM, BD], tl.float32)
    o_d = d + tl.arange(0, BD)
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        row = (first + tl.minimum(o_d if FORWARD else o_c, N - 1)) * K
        b_W = decoded_tile(
            codes, pairs, absmax, nested_absmax, nested_map, nested_offset, row, c if FORWARD else d, K, BLOCKSIZE, SPAN,
            BD if FORWARD else BC, BC if FORWARD else BD,
        )  # fmt: skip
        b_u = load_rows(u, o_j, inside, o_c, stride_u, C)
        acc = dot(b_u, (b_W.T if FORWARD else b_W).to(u.dtype.element_ty), acc, PRECISION)
    add_to_rows(out, acc, o_j, inside, o_d, N if FORWARD else K)


def add_nf4_products(out: Tensor, u: Tensor, W: NF4Weight, rows: Rows, forward: bool) -> Tensor:
    """out[j] += u[j]·W_eᵀ in place, or u[j]·W_e; rows of W have an even number of codes."""
    (E, N, K), M = W.shape, len(u)
    tile, launch = products(u.dtype, E, N, K, u.stride(0), forward, kind(W), tuning.precision(u.dtype))
    grid = most_tiles(M, E, tile), -(-(N if forward else K) // tile.columns)
    launch(grid, u, W.codes, *tables(W), out, rows.offsets, E, M, N, K, u.stride(0))
    return out


@kept
def products(
    dtype: torch.dtype, E: int, N: int, K: int, stride: int, forward: bool, of_W: Kind, precision: str
) -> tuple[Tile, Launch]:
    """The tile and the launch for stacks of this size and kind; rows may begin inside of blocks."""
    tile, blocksize = TILES[dtype.itemsize], of_W[0]
    span = math.gcd(blocksize, K, tile.depth if forward else tile.columns)
    launch = Launch(
        segment_nf4_product_kernel, tile.options() | {"enable_fp_fusion": False}, FORWARD=forward, BLOCKSIZE=blocksize,
        SPAN=span, PRECISION=precision, BD=tile.columns, BC=tile.depth, **of_segments(E, tile),
    )  # fmt: skip
    return tile, launch
