"""Equations 3 and 6: g, dB and dc in one pass over dy."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import call, dtype_of, two
from ..tuning import Tile
from .sums import new_parts, sum_parts
from .tiles import dot, load_tile, scalar, store_tile


@triton.jit
def add_reductions(
    b_dy, h, b_B, parts_g, parts_dB, parts_dc, acc_dB, acc_dc, s, i_n, o_m, M, R: tl.constexpr,
    PRECISION: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """(acc_dB + dyᵀ·h, acc_dc + Σ dy) of one tile of dy, and its part of g to memory, each where it is wanted."""
    if parts_g is not None:
        b_g = s * dot(b_dy, b_B, None, PRECISION)
        store_tile(parts_g + i_n.to(tl.int64) * M * R, b_g, o_m, tl.arange(0, BR), R, M, R)
    if parts_dB is not None:
        acc_dB = dot(b_dy.T, load_tile(h, o_m, tl.arange(0, BR), R, M, R), acc_dB, PRECISION)
    if parts_dc is not None:
        acc_dc += tl.sum(b_dy.to(tl.float32), axis=0)
    return acc_dB, acc_dc


@triton.jit
def store_reductions(parts_dB, parts_dc, acc_dB, acc_dc, s, i_m, o_n, N, R: tl.constexpr, BR: tl.constexpr):
    """parts_dB[i_m, N, R], parts_dc[i_m, N]."""
    if parts_dB is not None:
        store_tile(parts_dB + i_m.to(tl.int64) * N * R, s * acc_dB, o_n, tl.arange(0, BR), R, N, R)
    if parts_dc is not None:
        tl.store(parts_dc + i_m.to(tl.int64) * N + o_n, acc_dc, mask=o_n < N)


@triton.jit(do_not_specialize=["M"])
def grad_dy_kernel(
    dy, h, B, parts_g, parts_dB, parts_dc, s, M, N, R: tl.constexpr, stride_dy, part_rows,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """g = s·dy·B, dB = s·dyᵀ·h, dc = Σ dy: what one program's strip of BN columns and range of rows adds to each.

    parts_g[i_n, M, R], parts_dB[i_m, N, R], parts_dc[i_m, N]; a None among them is not computed.
    """
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    s, b_B = scalar(s), None
    if parts_g is not None:
        b_B = load_tile(B, o_n, tl.arange(0, BR), R, N, R)
    acc_dB, acc_dc = tl.zeros([BN, BR], tl.float32), tl.zeros([BN], tl.float32)
    for m in range(i_m * part_rows, tl.minimum(M, (i_m + 1) * part_rows), BM):
        o_m = m + tl.arange(0, BM)
        b_dy = load_tile(dy, o_m, o_n, stride_dy, M, N)
        acc_dB, acc_dc = add_reductions(
            b_dy, h, b_B, parts_g, parts_dB, parts_dc, acc_dB, acc_dc, s, i_n, o_m, M, R, PRECISION, BR
        )
    store_reductions(parts_dB, parts_dc, acc_dB, acc_dc, s, i_m, o_n, N, R, BR)


Three = tuple[Tensor | None, Tensor | None, Tensor | None]


def grad_dy(
    dy: Tensor, h: Tensor | None, B: Tensor | None, s: float | Tensor, need_g: bool, need_B: bool, need_c: bool
) -> Three:
    """g = s·dy·B in B's dtype, dB in h's dtype, dc in float32, each if needed."""
    if not (need_g or need_B or need_c):
        return None, None, None
    B, h = B if need_g else None, h if need_B else None
    adapter = B if h is None else h
    R, dtype = (1, dy.dtype) if adapter is None else (adapter.shape[1], adapter.dtype)
    key = (
        dy.device, dy.dtype, dtype, R, dy.shape[1], dy.stride(0), dtype_of(s), need_g, need_B, need_c,
        tuning.precision(dy.dtype),
    )  # fmt: skip
    return call("grad_dy", reductions, key, dy, h, B, s)


def reductions(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    N: int,
    stride_dy: int,
    of_s: torch.dtype | None,
    need_g: bool,
    need_B: bool,
    need_c: bool,
    precision: str,
) -> Callable[..., Three]:
    """run(dy, h, B, s): g, dB and dc with this tile."""
    launches = two(grad_dy_kernel, tile.options(), PRECISION=precision, BM=tile.rows, BN=tile.columns, BR=tuning.padded_rank(R))
    strips, programs = -(-N // tile.columns), 2 * tuning.gpu(device).processors

    def run(dy: Tensor, h: Tensor | None, B: Tensor | None, s: float | Tensor) -> Three:
        M = dy.shape[0]
        count, part_rows = tuning.splits(M, tile.rows, strips, programs)
        parts_g = new_parts(strips, M, R, dtype=adapter, device=device) if need_g else None
        parts_dB = new_parts(count, N, R, dtype=adapter, device=device) if need_B else None
        parts_dc = new_parts(count, N, dtype=torch.float32, device=device) if need_c else None
        launches[count > 1]((strips, count), dy, h, B, parts_g, parts_dB, parts_dc, s, M, N, R, stride_dy, part_rows)
        if strips == 1 == count:
            return parts_g, parts_dB, parts_dc
        g, dB, dc = sum_parts((parts_g, strips, adapter), (parts_dB, count, adapter), (parts_dc, count, torch.float32))
        return g, dB, dc

    return run
