"""Equations 14 and 15 (reference/grouped_linear.py): each program takes rows of one segment, which it finds by the offsets.

No host knows where segments end: there are as many programs as tiles could be at most, and those beyond the last do nothing.
Rows of no segment are the segment after the last. An adapter is read by the programs of its own rows alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....values import Rows
from .. import tuning
from ..launch import Launch, dtype_of, kept
from ..tuning import Tile
from .mask import keep_tile
from .tiles import dot

KEEP_ALL, DROP_ALL = -1, -2  # edges: of the latter what is kept is multiplied by 0
_KEEP_ALL = tl.constexpr(KEEP_ALL)
SHRINK, EXPAND, PRODUCT = Tile(32, 64, 4, 2), Tile(32, 64, 4), Tile(64, 64, 4, 3, 32)
REDUCE = {2: Tile(32, 64, 4, 2), 4: Tile(32, 32, 4, 2)}  # by u's bytes; of 64 float32 Triton 3.6 multiplies in TF32 on sm_100


@triton.jit
def tile_of(offsets, order, i_tile, E, M, BE: tl.constexpr, BM: tl.constexpr):
    """(segment, the tile's places among the sorted rows, which of them are its own, the rows of x there)."""
    o_e = tl.arange(0, BE)
    starts = tl.load(offsets + o_e, mask=o_e <= E, other=M)
    stops = tl.load(offsets + o_e + 1, mask=o_e < E, other=M)
    last = tl.cumsum((stops - starts + BM - 1) // BM, axis=0)  # the first tile after each segment's
    before = last <= i_tile
    e = tl.sum(before.to(tl.int32), axis=0)
    here = o_e == e
    first = i_tile - tl.max(tl.where(before, last, 0), axis=0)
    o_j = tl.sum(tl.where(here, starts, 0), axis=0) + first * BM + tl.arange(0, BM)
    inside = o_j < tl.sum(tl.where(here, stops, 0), axis=0)
    o_i = o_j
    if order is not None:
        o_i = tl.load(order + o_j, mask=inside, other=0).to(tl.int32)
    return e, o_j, inside, o_i


@triton.jit
def kept_tile(seed, edge, o_row, column, COLUMNS: tl.constexpr):
    """keep(seed, row, column) of a segment with this edge; all of one without dropout, KEEP_ALL."""
    return keep_tile(seed, edge, o_row, column, 0, COLUMNS) | (edge == _KEEP_ALL)


@triton.jit
def load_rows(p, o_row, inside, o_column, stride, columns):
    """p[o_row, o_column] of the rows inside."""
    p_tile = p + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
    return tl.load(p_tile, mask=inside[:, None] & (o_column < columns)[None, :], other=0.0)


@triton.jit
def add_to_rows(p, value, o_row, inside, o_column, columns):
    """p[o_row, o_column] += value, of the rows inside, which are adjacent."""
    value += load_rows(p, o_row, inside, o_column, columns, columns).to(tl.float32)
    p_tile = p + o_row.to(tl.int64)[:, None] * columns + o_column[None, :]
    tl.store(p_tile, value.to(p.dtype.element_ty), mask=inside[:, None] & (o_column < columns)[None, :])


@triton.jit
def load_factor(F, e, o_r, o_k, stride_r, stride_k, R, K):
    """F[e, o_r, o_k] of a stack whose segments are R·K apart."""
    p_tile = F + e.to(tl.int64) * R * K + o_r[:, None] * stride_r + o_k[None, :] * stride_k
    return tl.load(p_tile, mask=(o_r < R)[:, None] & (o_k < K)[None, :], other=0.0)


@triton.jit(do_not_specialize=["M"])
def segment_shrink_kernel(
    u, F, out, offsets, order, factors, edges, seed, E, M, K, stride_u, R: tl.constexpr, STRIDE_R: tl.constexpr,
    STRIDE_K: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[j] = factor_e·drop(u)[i]·F_eᵀ of the sorted rows j, which are rows i of u; F[E, R, K] by its strides."""
    e, o_j, inside, o_i = tile_of(offsets, order, tl.program_id(0), E, M, BE, BM)
    if e > E:
        return
    inside = inside & (e < E)
    e = tl.minimum(e, E - 1)
    o_r, acc = tl.arange(0, BR), tl.zeros([BM, BR], tl.float32)
    if DROP:
        seed, edge = tl.load(seed), tl.load(edges + e)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_u = load_rows(u, o_i, inside, o_k, stride_u, K)
        if DROP:
            b_u = tl.where(kept_tile(seed, edge, o_i, k, BK), b_u, 0.0)
        acc = dot(b_u, load_factor(F, e, o_r, o_k, STRIDE_R, STRIDE_K, R, K).T, acc, PRECISION)
    acc *= tl.load(factors + e)
    p_out = out + o_j.to(tl.int64)[:, None] * R + o_r[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=inside[:, None] & (o_r < R)[None, :])


@triton.jit(do_not_specialize=["M"])
def segment_expand_kernel(
    v, F, c, out, offsets, order, factors, edges, seed, E, M, N, R: tl.constexpr, STRIDE_R: tl.constexpr,
    STRIDE_K: tl.constexpr, STRIDE_C: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[i] = factor_e·undrop(v[j]·F_e) + c_e of the sorted rows j, which are rows i of out; F[E, R, N] by its strides.

    Of no segment: c, where it is shared (STRIDE_C = 0), else zeros. c may be None.
    """
    e, o_j, inside, o_i = tile_of(offsets, order, tl.program_id(0), E, M, BE, BM)
    if e > E:
        return
    some, e = e < E, tl.minimum(e, E - 1)
    n = tl.program_id(1) * BN
    o_r, o_n = tl.arange(0, BR), n + tl.arange(0, BN)
    b_F = load_factor(F, e, o_r, o_n, STRIDE_R, STRIDE_K, R, N)
    acc = dot(load_rows(v, o_j, inside & some, o_r, R, R), b_F, None, PRECISION) * tl.load(factors + e)
    if DROP:
        acc = tl.where(kept_tile(tl.load(seed), tl.load(edges + e), o_i, n, BN), acc, 0.0)
    acc = tl.where(some, acc, 0.0)
    if c is not None:
        b_c = tl.load(c + e.to(tl.int64) * STRIDE_C + o_n, mask=(o_n < N) & (some | (STRIDE_C == 0)), other=0.0)
        acc += b_c.to(tl.float32)[None, :]
    p_out = out + o_i.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=inside[:, None] & (o_n < N)[None, :])


@triton.jit
def segment_reduce_kernel(
    v, u, out, sums, offsets, order, factors, edges, seed, K, stride_u, R: tl.constexpr, STRIDE_R: tl.constexpr,
    STRIDE_K: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out_e = factor_e·Σ_j v[j]ᵀ·drop(u)[i] and sums_e = Σ_j u[i] over the rows of a segment, a strip of BK columns.

    out[E, R, K] by its strides, sums[E, K]; either may be None. Of a segment without rows both are zeros.
    """
    e, k = tl.program_id(0), tl.program_id(1) * BK
    start, stop = tl.load(offsets + e), tl.load(offsets + e + 1)
    o_r, o_k = tl.arange(0, BR), k + tl.arange(0, BK)
    acc, acc_sums = tl.zeros([BK, BR], tl.float32), tl.zeros([BK], tl.float32)
    if DROP:
        seed, edge = tl.load(seed), tl.load(edges + e)
    for j in range(start, stop, BM):
        o_j = j + tl.arange(0, BM)
        inside, o_i = o_j < stop, o_j
        if order is not None:
            o_i = tl.load(order + o_j, mask=inside, other=0).to(tl.int32)
        b_u = load_rows(u, o_i, inside, o_k, stride_u, K)
        if sums is not None:
            acc_sums += tl.sum(b_u.to(tl.float32), axis=0)
        if out is not None:
            if DROP:
                b_u = tl.where(kept_tile(seed, edge, o_i, k, BK), b_u, 0.0)
            acc = dot(b_u.T, load_rows(v, o_j, inside, o_r, R, R), acc, PRECISION)
    if out is not None:
        acc *= tl.load(factors + e)
        p_out = out + e.to(tl.int64) * R * K + o_r[None, :] * STRIDE_R + o_k[:, None] * STRIDE_K
        tl.store(p_out, acc.to(out.dtype.element_ty), mask=(o_r < R)[None, :] & (o_k < K)[:, None])
    if sums is not None:
        tl.store(sums + e.to(tl.int64) * K + o_k, acc_sums, mask=o_k < K)


@triton.jit(do_not_specialize=["M"])
def segment_product_kernel(
    u, W, out, offsets, E, M, K, N, stride_u, stride_e, stride_n, stride_k, PRECISION: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[j] += u[j]·W_eᵀ of the rows of each segment, for W[E, N, K] of any strides; those of none stay."""
    e, o_j, inside, _ = tile_of(offsets, None, tl.program_id(0), E, M, BE, BM)
    if e >= E:
        return
    W += e.to(tl.int64) * stride_e
    o_n, acc = tl.program_id(1) * BN + tl.arange(0, BN), tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        p_W = W + o_k.to(tl.int64)[:, None] * stride_k + o_n.to(tl.int64)[None, :] * stride_n
        b_W = tl.load(p_W, mask=(o_k < K)[:, None] & (o_n < N)[None, :], other=0.0)
        acc = dot(load_rows(u, o_j, inside, o_k, stride_u, K), b_W, acc, PRECISION)
    add_to_rows(out, acc, o_j, inside, o_n, N)


def shrink(
    u: Tensor, F: Tensor, transposed: bool, factors: Tensor, edges: Tensor | None, seed: Tensor | None, rows: Rows
) -> Tensor:
    """factor_e·drop(u)·F_eᵀ by sorted row, [M, R] in F's dtype, zeros of no segment; F[E, R, K], or transposed [E, K, R]."""
    (E, R, K), (M, _) = _sizes(F, transposed), u.shape
    out = F.new_zeros(M, R)
    key = u.dtype, F.dtype, R, E, K, u.stride(0), transposed, edges is None, rows.order is None, tuning.precision(u.dtype)
    grid = most_tiles(M, E, SHRINK), 1
    shrinks(*key)(grid, u, F, out, rows.offsets, rows.order, factors, edges, seed, E, M, K, u.stride(0))
    return out


def expand(
    v: Tensor, F: Tensor, transposed: bool, c: Tensor | None, dtype: torch.dtype, factors: Tensor, edges: Tensor | None,
    seed: Tensor | None, rows: Rows,
) -> Tensor:  # fmt: skip
    """factor_e·undrop(v·F_e) + c_e by row of x, [M, N] of `dtype`; F[E, R, N], or [E, N, R] transposed; c[E, N] or [N]."""
    (E, R, N), M = _sizes(F, transposed), len(v)
    out = v.new_empty(M, N, dtype=dtype)
    key = (
        dtype, F.dtype, R, E, N, transposed, dtype_of(c), c is not None and c.ndim == 2, edges is None, rows.order is None,
        tuning.precision(dtype),
    )  # fmt: skip
    grid = most_tiles(M, E, EXPAND), -(-N // EXPAND.columns)
    expands(*key)(grid, v, F, c, out, rows.offsets, rows.order, factors, edges, seed, E, M, N)
    return out


def reduce(
    v: Tensor | None, u: Tensor, transposed: bool, factors: Tensor, edges: Tensor | None, seed: Tensor | None, rows: Rows,
    need_sums: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(factor_e·Σ v[j]ᵀ·drop(u)[i] over a segment in v's dtype, [E, R, K], transposed [E, K, R]; Σ u[i] in float32, [E, K])."""
    K, E, R = u.shape[1], rows.offsets.shape[0] - 1, 1 if v is None else v.shape[1]
    out = None if v is None else v.new_empty((E, K, R) if transposed else (E, R, K))
    sums = u.new_empty(E, K, dtype=torch.float32) if need_sums else None
    of_v = u.dtype if v is None else v.dtype
    key = (
        u.dtype, of_v, R, K, u.stride(0), transposed, out is None, need_sums, edges is None, rows.order is None,
        tuning.precision(u.dtype),
    )  # fmt: skip
    grid = E, -(-K // REDUCE[u.element_size()].columns)
    reduces(*key)(grid, v, u, out, sums, rows.offsets, rows.order, factors, edges, seed, K, u.stride(0))
    return out, sums


def add_products(out: Tensor, u: Tensor, W: Tensor, rows: Rows) -> Tensor:
    """out[j] += u[j]·W_eᵀ in place, for W[E, N, K] of any strides."""
    (E, N, K), M = W.shape, len(u)
    products(u.dtype, E, N, K, u.stride(0), W.stride(), tuning.precision(u.dtype))(
        (most_tiles(M, E, PRODUCT), -(-N // PRODUCT.columns)), u, W, out, rows.offsets, E, M, K, N, u.stride(0), *W.stride()
    )
    return out


def _sizes(F: Tensor, transposed: bool) -> tuple[int, int, int]:
    E, R, K = F.shape
    return (E, K, R) if transposed else (E, R, K)


def most_tiles(M: int, E: int, tile: Tile) -> int:
    """Tiles that M rows in E segments, and those of none, are cut into at most."""
    return M // tile.rows + min(M, E + 1)


def _of_rank(R: int, K: int, transposed: bool) -> dict[str, int]:
    strides = {"STRIDE_R": 1, "STRIDE_K": R} if transposed else {"STRIDE_R": K, "STRIDE_K": 1}
    return {"R": R, "BR": tuning.padded_rank(R), **strides}


def of_segments(E: int, tile: Tile) -> dict[str, int]:
    return {"BE": triton.next_power_of_2(E + 1), "BM": tile.rows}


@kept
def shrinks(
    dtype: torch.dtype, adapter: torch.dtype, R: int, E: int, K: int, stride: int, transposed: bool, whole: bool, sorted_: bool,
    precision: str,
) -> Launch:  # fmt: skip
    constants = {**_of_rank(R, K, transposed), **of_segments(E, SHRINK), "BK": SHRINK.columns}
    return Launch(segment_shrink_kernel, SHRINK.options(), DROP=not whole, PRECISION=precision, **constants)


@kept
def expands(
    dtype: torch.dtype, adapter: torch.dtype, R: int, E: int, N: int, transposed: bool, of_c: torch.dtype | None, own_c: bool,
    whole: bool, sorted_: bool, precision: str,
) -> Launch:  # fmt: skip
    constants = {**_of_rank(R, N, transposed), **of_segments(E, EXPAND), "BN": EXPAND.columns, "STRIDE_C": N if own_c else 0}
    return Launch(segment_expand_kernel, EXPAND.options(), DROP=not whole, PRECISION=precision, **constants)


@kept
def reduces(
    dtype: torch.dtype, of_v: torch.dtype, R: int, K: int, stride: int, transposed: bool, only_sums: bool, need_sums: bool,
    whole: bool, sorted_: bool, precision: str,
) -> Launch:  # fmt: skip
    tile = REDUCE[dtype.itemsize]
    constants = {**_of_rank(R, K, transposed), "BM": tile.rows, "BK": tile.columns}
    return Launch(segment_reduce_kernel, tile.options(), DROP=not whole, PRECISION=precision, **constants)


@kept
def products(dtype: torch.dtype, E: int, N: int, K: int, stride: int, strides: tuple[int, ...], precision: str) -> Launch:
    constants = {**of_segments(E, PRODUCT), "BN": PRODUCT.columns, "BK": PRODUCT.depth}
    return Launch(segment_product_kernel, PRODUCT.options(), PRECISION=precision, **constants)
