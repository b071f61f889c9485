"""Equation 1: h of up to three members in one pass over x, each with its own mask."""

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
def add_projection(
    acc, b_x, A, seed, edge, o_m, o_k, k, K, R: tl.constexpr, OFFSET: tl.constexpr,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc + (x · keep)·Aᵀ of one tile of x."""
    if DROP:
        b_x = tl.where(keep_tile(seed, edge, o_m, k, OFFSET, BK), b_x, 0.0)
    return dot(b_x, load_tile(A, tl.arange(0, BR), o_k, K, R, K).T, acc, PRECISION)


@triton.jit(do_not_specialize=["M", "edge"])
def project_kernel(
    x, A0, parts0, A1, parts1, A2, parts2, seed, edge, keep_scale, M, K, stride_x, part_columns,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, OFFSET2: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr,
):  # fmt: skip
    """h_i = drop_i(x)·A_iᵀ: parts_i[i_k, M, R_i] of one range of columns each; a program owns BM rows of one range.

    A1 or A2 may be None: there is no such member.
    """
    i_m, i_k = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    acc0, acc1, acc2 = tl.zeros([BM, BR0], tl.float32), tl.zeros([BM, BR1], tl.float32), tl.zeros([BM, BR2], tl.float32)
    if DROP:
        seed = tl.load(seed)
    for k in range(i_k * part_columns, tl.minimum(K, (i_k + 1) * part_columns), BK):
        o_k = k + tl.arange(0, BK)
        b_x = load_tile(x, o_m, o_k, stride_x, M, K)
        acc0 = add_projection(acc0, b_x, A0, seed, edge, o_m, o_k, k, K, R0, OFFSET0, DROP, PRECISION, BK, BR0)
        if A1 is not None:
            acc1 = add_projection(acc1, b_x, A1, seed, edge, o_m, o_k, k, K, R1, OFFSET1, DROP, PRECISION, BK, BR1)
        if A2 is not None:
            acc2 = add_projection(acc2, b_x, A2, seed, edge, o_m, o_k, k, K, R2, OFFSET2, DROP, PRECISION, BK, BR2)
    part = i_k.to(tl.int64) * M
    store_tile(parts0 + part * R0, acc0 * keep_scale, o_m, tl.arange(0, BR0), R0, M, R0)
    if A1 is not None:
        store_tile(parts1 + part * R1, acc1 * keep_scale, o_m, tl.arange(0, BR1), R1, M, R1)
    if A2 is not None:
        store_tile(parts2 + part * R2, acc2 * keep_scale, o_m, tl.arange(0, BR2), R2, M, R2)


def project(x: Tensor, As: tuple[Tensor, ...], dropout: Dropout | None, numbers: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    """Equation 1 of up to three members, h each. Where M is small, K is split so that every processor reads parts of x.

    numbers: the members', which their masks follow.
    """
    p, seed, offset = words(dropout)
    kinds, K = tuple([(A.shape[0], A.dtype) for A in As]), As[0].shape[1]
    offsets = tuple([offset + number for number in numbers[: len(As)]]) if p else (0,) * len(As)
    key = x.device, x.dtype, *most(x.dtype, kinds), kinds, offsets, K, x.stride(0), p, tuning.precision(x.dtype)
    return call("project" if len(As) == 1 else "project_group", projections, key, x, As, seed)


def projections(
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
    precision: str,
) -> Callable[..., list[Tensor]]:
    """run(x, As, seed): equation 1 with this tile."""
    launches = two(
        project_kernel, tile.options(), DROP=p is not None, PRECISION=precision, BM=tile.rows, BK=tile.columns,
        **constants(kinds, offsets),
    )  # fmt: skip
    width, wanted = max(256, tile.columns), 2 * tuning.gpu(device).processors
    bits, scale = edge(p or 0.0), keep_scale(p or 0.0)

    def run(x: Tensor, As: tuple[Tensor, ...], seed: Tensor | None) -> list[Tensor]:
        M = x.shape[0]
        programs = -(-M // tile.rows)
        count, part_columns = tuning.splits(K, width, programs, wanted)
        parts = [new_parts(count, M, R, dtype=adapter, device=device) for R, adapter in kinds]
        launches[count > 1](
            (programs, count), x, *in_turn(As, parts), seed, bits, scale, M, K, stride_x, part_columns
        )  # fmt: skip
        if count == 1:
            return parts
        return sum_parts(*[(part, count, adapter) for part, (_, adapter) in zip(parts, kinds, strict=True)])  # type: ignore[return-value]

    return run
