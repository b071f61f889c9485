"""Equation 5, and dx's low-rank terms of 4, of up to three members in one pass over x; one mask of each serves both."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import keep_scale
from ....values import Dropout
from .. import tuning
from ..launch import call, two
from ..tuning import Tile
from .mask import edge, keep_tile
from .members import Kinds, constants, in_turn, most, words
from .sums import new_parts, sum_parts
from .tiles import dot, load_tile, store_tile


@triton.jit
def g_and_keep(
    g, seed, edge, o_m, k, M, R: tl.constexpr, OFFSET: tl.constexpr, DROP: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr
):
    """A member's g of these rows, and its mask of a tile of x; without dropout g stands for it, and is not read."""
    b_g = load_tile(g, o_m, tl.arange(0, BR), R, M, R)
    if DROP:
        keep = keep_tile(seed, edge, o_m, k, OFFSET, BK)
    else:
        keep = b_g
    return b_g, keep


@triton.jit
def member_gradients(
    dx, b_x, b_g, keep, b_A, parts_dA, acc_dA, keep_scale, ALONE: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """(undrop(g·A), acc_dA + (x · keep)ᵀ·g) of one member and tile of x, each where it is wanted: one mask serves both."""
    if parts_dA is not None:
        if DROP:
            b_x = tl.where(keep, b_x, 0.0)
        acc_dA = dot(b_x.T, b_g, acc_dA, PRECISION)
    low_rank = 0.0
    if dx is not None:
        low_rank = keep_scale * dot(b_g, b_A, None, PRECISION)
        if ALONE:  # it is all of dx, and in dx's dtype takes half the registers beside the mask
            low_rank = low_rank.to(dx.dtype.element_ty)
        if DROP:
            low_rank = tl.where(keep, low_rank, 0.0)
    return low_rank, acc_dA


@triton.jit
def store_part(parts_dA, acc_dA, keep_scale, i_m, o_k, K, R: tl.constexpr, BR: tl.constexpr):
    """parts_dA[i_m, R, K] of one member."""
    store_tile(parts_dA + i_m.to(tl.int64) * R * K, keep_scale * tl.trans(acc_dA), tl.arange(0, BR), o_k, K, R, K)


@triton.jit(do_not_specialize=["M", "edge"])
def grad_x_kernel(
    x, dx, g0, A0, parts_dA0, g1, A1, parts_dA1, g2, A2, parts_dA2, seed, edge, keep_scale, M, K, stride_x,
    part_rows, DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, OFFSET2: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr,
):  # fmt: skip
    """dx = Σ undrop_i(g_i·A_i), dA_i = g_iᵀ·drop_i(x): a strip of BK columns and a range of rows.

    parts_dA_i[i_m, R_i, K]. g1 or g2 may be None: there is no such member; dx, or any parts_dA_i: it is not computed.
    """
    i_k, i_m = tl.program_id(0), tl.program_id(1)
    ALONE: tl.constexpr = g1 is None
    k, o_k = i_k * BK, i_k * BK + tl.arange(0, BK)
    if DROP:
        seed = tl.load(seed)
    b_A0, b_A1, b_A2 = None, None, None
    if dx is not None:
        b_A0 = load_tile(A0, tl.arange(0, BR0), o_k, K, R0, K)
        if g1 is not None:
            b_A1 = load_tile(A1, tl.arange(0, BR1), o_k, K, R1, K)
        if g2 is not None:
            b_A2 = load_tile(A2, tl.arange(0, BR2), o_k, K, R2, K)
    acc0, acc1, acc2 = tl.zeros([BK, BR0], tl.float32), tl.zeros([BK, BR1], tl.float32), tl.zeros([BK, BR2], tl.float32)
    for m in range(i_m * part_rows, tl.minimum(M, (i_m + 1) * part_rows), BM):
        o_m = m + tl.arange(0, BM)
        b_g, keep = g_and_keep(g0, seed, edge, o_m, k, M, R0, OFFSET0, DROP, BK, BR0)
        b_x = None
        if x is not None:
            b_x = load_tile(x, o_m, o_k, stride_x, M, K)
        b_dx, acc0 = member_gradients(dx, b_x, b_g, keep, b_A0, parts_dA0, acc0, keep_scale, ALONE, DROP, PRECISION)
        if g1 is not None:
            b_g, keep = g_and_keep(g1, seed, edge, o_m, k, M, R1, OFFSET1, DROP, BK, BR1)
            low_rank, acc1 = member_gradients(dx, b_x, b_g, keep, b_A1, parts_dA1, acc1, keep_scale, ALONE, DROP, PRECISION)
            b_dx += low_rank
        if g2 is not None:
            b_g, keep = g_and_keep(g2, seed, edge, o_m, k, M, R2, OFFSET2, DROP, BK, BR2)
            low_rank, acc2 = member_gradients(dx, b_x, b_g, keep, b_A2, parts_dA2, acc2, keep_scale, ALONE, DROP, PRECISION)
            b_dx += low_rank
        if dx is not None:
            store_tile(dx, b_dx, o_m, o_k, K, M, K)
    if parts_dA0 is not None:
        store_part(parts_dA0, acc0, keep_scale, i_m, o_k, K, R0, BR0)
    if parts_dA1 is not None:
        store_part(parts_dA1, acc1, keep_scale, i_m, o_k, K, R1, BR1)
    if parts_dA2 is not None:
        store_part(parts_dA2, acc2, keep_scale, i_m, o_k, K, R2, BR2)


Result = tuple[Tensor | None, list[Tensor | None]]


def grad_x(
    x: Tensor | None,
    gs: tuple[Tensor, ...],
    As: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    dtype: torch.dtype,
    need_x: bool,
    need_As: tuple[bool, ...],
    numbers: tuple[int, ...] = (0, 1, 2),
) -> Result:
    """Σ undrop(g·A) over up to three members in `dtype`, and the dA of each in its g's dtype, each if needed.

    numbers: the members', which their masks follow.
    """
    need_A = True in need_As
    if not (need_x or need_A):
        return None, [None] * len(gs)
    As, x = As if need_x else (None,) * len(gs), x if need_A else None
    K, stride_x = (As[0].shape[1], 0) if x is None else (x.shape[1], x.stride(0))
    (p, seed, offset), kinds = words(dropout), tuple([(g.shape[1], g.dtype) for g in gs])
    offsets = tuple([offset + number for number in numbers[: len(gs)]]) if p else (0,) * len(gs)
    key = (
        gs[0].device, dtype, *most(dtype, kinds), kinds, offsets, K, stride_x, p, need_x, need_As, tuning.precision(dtype)
    )  # fmt: skip
    kernel = "grad_x" if len(gs) == 1 else "grad_x_group"
    return call(kernel, gradients, key, x, gs, As, seed)


def gradients(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    kinds: Kinds,
    offsets: tuple[int, ...],
    K: int,
    stride_x: int,
    p: float | None,
    need_x: bool,
    need_As: tuple[bool, ...],
    precision: str,
) -> Callable[..., Result]:
    """run(x, gs, As, seed): dx's low-rank term and the dA of each member with this tile."""
    launches = two(
        grad_x_kernel, tile.options(), DROP=p is not None, PRECISION=precision, BM=tile.rows, BK=tile.columns,
        **constants(kinds, offsets),
    )  # fmt: skip
    gpu, strips = tuning.gpu(device), -(-K // tile.columns)
    bits, scale = edge(p or 0.0), keep_scale(p or 0.0)

    def parts_of(count: int) -> list[Tensor | None]:
        pairs = zip(kinds, need_As, strict=True)
        return [new_parts(count, R, K, dtype=own, device=device) if need else None for (R, own), need in pairs]

    def summed(parts: list[Tensor | None], count: int) -> list[Tensor | None]:
        return sum_parts(*[(part, count, own) for part, (_, own) in zip(parts, kinds, strict=True)])

    def run(x: Tensor | None, gs: tuple[Tensor, ...], As: tuple, seed: Tensor | None) -> Result:
        M = gs[0].shape[0]
        count, part_rows = tuning.splits(M, tile.rows, strips, 2 * gpu.processors)
        dx = torch.empty(M, K, dtype=dtype, device=device) if need_x else None
        parts = parts_of(count)
        launches[count > 1](
            (strips, count), x, dx, *in_turn(gs, As, parts), seed, bits, scale, M, K, stride_x, part_rows
        )  # fmt: skip
        return dx, parts if count == 1 else summed(parts, count)

    return run
