"""y = s·h·Bᵀ + c + x·Wᵀ and dx = undrop(g·A) + dy·W in one kernel each: a matrix product of two segments.

The low-rank segment comes first in the accumulator, where the mask meets nothing else, and the main loop adds to it.
Both directions are out = low + a·w: forward w = Wᵀ and low = s·h·Bᵀ + c, backward w = W and low = undrop(g·A).
Used only where a measurement says that it beats prefill and the vendor's product (tuning.dataflow).
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ....mask import keep_scale
from ....values import Dropout
from .. import tuning
from ..launch import Launch, call, dtype_of
from ..tuning import Tile
from .mask import edge, keep_tile
from .members import words
from .tiles import dot, load_tile, scalar, store_tile


@triton.jit
def tile_of(i_tile, row_tiles, column_tiles, GROUP: tl.constexpr = 8):
    """Row and column block of the i-th tile: down a group of row blocks, which share columns of W in L2, then on."""
    first = i_tile // (GROUP * column_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = i_tile % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def low_rank_tile(
    u, V, c, s, seed, edge, o_m, column, M, D, R: tl.constexpr,
    FORWARD: tl.constexpr, DROP: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Forward s·u·Vᵀ + c with u = h, V = B[D, R]; backward undrop(u·V) with u = g, V = A[R, D], s = 1 / (1 - p̂)."""
    o_d, o_r = column + tl.arange(0, BD), tl.arange(0, BR)
    b_V = load_tile(V, o_d, o_r, R, D, R).T if FORWARD else load_tile(V, o_r, o_d, D, R, D)
    acc = scalar(s) * dot(load_tile(u, o_m, o_r, R, M, R), b_V, None, PRECISION)
    if c is not None:
        acc += tl.load(c + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if DROP:
        acc = tl.where(keep_tile(tl.load(seed), edge, o_m, column, OFFSET, BD), acc, 0.0)
    return acc


@triton.jit(do_not_specialize=["M", "edge"])
def lowrank_product_kernel(
    a, W, out, u, V, c, s, seed, edge, M, C, D, R: tl.constexpr, stride_a, stride_W,
    FORWARD: tl.constexpr, DROP: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[M, D] = low + a[M, C]·w, one tile per program, by pointers: any shape on any GPU."""
    i_m, i_d = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(D, BD))
    o_m, o_d = i_m * BM + tl.arange(0, BM), i_d * BD + tl.arange(0, BD)
    acc = low_rank_tile(u, V, c, s, seed, edge, o_m, i_d * BD, M, D, R, FORWARD, DROP, OFFSET, PRECISION, BM, BD, BR)
    for column in range(0, C, BC):
        o_c = column + tl.arange(0, BC)
        b_w = load_tile(W, o_d, o_c, stride_W, D, C).T if FORWARD else load_tile(W, o_c, o_d, stride_W, C, D)
        acc = tl.dot(load_tile(a, o_m, o_c, stride_a, M, C), b_w, acc)
    store_tile(out, acc, o_m, o_d, D, M, D)


@triton.jit(do_not_specialize=["M", "edge"])
def lowrank_product_tma_kernel(
    a, W, out, u, V, c, s, seed, edge, M, C, D, R: tl.constexpr,
    FORWARD: tl.constexpr, DROP: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The same with tensor descriptors a, W, out: one program per processor walks over the tiles.

    out leaves in two halves of columns: one [128, 256] tile in shared memory would cost a stage of the main loop.
    """
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(D, BD)
    for i_tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        i_m, i_d = tile_of(i_tile, row_tiles, column_tiles)
        m, d = i_m * BM, i_d * BD
        o_m = m + tl.arange(0, BM)
        acc = low_rank_tile(u, V, c, s, seed, edge, o_m, d, M, D, R, FORWARD, DROP, OFFSET, PRECISION, BM, BD, BR)
        for column in range(0, C, BC):
            b_w = W.load([d, column]).T if FORWARD else W.load([column, d])
            acc = tl.dot(a.load([m, column]), b_w, acc)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BD // 2)), (0, 2, 1)))
        out.store([m, d], left.to(out.dtype))
        out.store([m, d + BD // 2], right.to(out.dtype))


def forward(x: Tensor, W: Tensor, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
    """Equation 2 in one kernel, for 16-bit x with dense rows: y[M, N]."""
    return _call(x, W, h, B, c, s, None, forward=True)


def backward(dy: Tensor, W: Tensor, g: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
    """Equation 4 in one kernel, for 16-bit dy with dense rows: dx[M, K]."""
    scale = 1.0 if dropout is None else keep_scale(dropout.p)
    return _call(dy, W, g, A, None, scale, dropout, forward=False)


def _call(
    a: Tensor,
    W: Tensor,
    u: Tensor,
    V: Tensor,
    c: Tensor | None,
    s: float | Tensor,
    dropout: Dropout | None,
    *,
    forward: bool,
) -> Tensor:
    C, D = a.shape[1], W.shape[0 if forward else 1]
    p, seed, offset = words(dropout)
    tma = tuning.gpu(a.device).capability in tuning.TMA_GPUS and tuning.tma_legal(a, W, columns=D)
    key = (
        a.device, a.dtype, u.dtype, u.shape[1], C, D, a.stride(0), W.stride(0), dtype_of(s), dtype_of(c), p, offset, forward,
        tuning.precision(a.dtype),
    )  # fmt: skip
    return call("lowrank_product_tma" if tma else "lowrank_product", product, key, a, W, u, V, c, s, seed)


def product(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    C: int,
    D: int,
    stride_a: int,
    stride_W: int,
    of_s: torch.dtype | None,
    of_c: torch.dtype | None,
    p: float | None,
    offset: int,
    forward: bool,
    precision: str,
) -> Callable[..., Tensor]:
    """run(a, W, u, V, c, s, seed): low + a·w with this tile."""
    launch = Launch(
        lowrank_product_tma_kernel if tile.tma else lowrank_product_kernel, tile.options(), FORWARD=forward, DROP=p is not None,
        OFFSET=offset, PRECISION=precision, BM=tile.rows, BD=tile.columns, BC=tile.depth, BR=tuning.padded_rank(R),
    )  # fmt: skip
    column_tiles, processors, bits = -(-D // tile.columns), tuning.gpu(device).processors, edge(p or 0.0)
    W_block = [tile.columns, tile.depth] if forward else [tile.depth, tile.columns]
    blocks = [tile.rows, tile.depth], W_block, [tile.rows, tile.columns // 2]

    def run(a: Tensor, W: Tensor, u: Tensor, V: Tensor, c: Tensor | None, s: float | Tensor, seed: Tensor | None) -> Tensor:
        M = a.shape[0]
        out = torch.empty(M, D, dtype=dtype, device=device)
        tiles = -(-M // tile.rows) * column_tiles
        rest = (u, V, c, s, seed, bits, M, C, D, R)
        if tile.tma:
            descriptors = [TensorDescriptor.from_tensor(*pair) for pair in zip((a, W, out), blocks, strict=True)]
            launch((min(tiles, processors), 1), *descriptors, *rest)
        else:
            launch((tiles, 1), a, W, out, *rest, stride_a, stride_W)
        return out

    return run
