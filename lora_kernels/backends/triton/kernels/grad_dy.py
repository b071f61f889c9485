"""Equations 3 and 6: g, dB and dc in one pass over dy."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..compilation import first_that_compiles
from ..tuning import Tile
from .sums import new_parts, sum_parts
from .tiles import dot, load_tile, scalar, store_tile


@triton.jit(do_not_specialize=["M"])
def grad_dy_kernel(
    dy, h, B, parts_g, parts_dB, parts_dc, s, M, N, R: tl.constexpr, stride_dy, part_rows,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """g = s·dy·B, dB = s·dyᵀ·h, dc = Σ dy: what one program's strip of BN columns and range of rows adds to each.

    parts_g[i_n, M, R], parts_dB[i_m, N, R], parts_dc[i_m, N]; a None among them is not computed.
    """
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n, o_r = i_n * BN + tl.arange(0, BN), tl.arange(0, BR)
    s = scalar(s)
    if parts_g is not None:
        b_B = load_tile(B, o_n, o_r, R, N, R)
    acc_dB, acc_dc = tl.zeros([BN, BR], tl.float32), tl.zeros([BN], tl.float32)
    for m in range(i_m * part_rows, tl.minimum(M, (i_m + 1) * part_rows), BM):
        o_m = m + tl.arange(0, BM)
        b_dy = load_tile(dy, o_m, o_n, stride_dy, M, N)
        if parts_g is not None:
            b_g = s * dot(b_dy, b_B, None, PRECISION)
            store_tile(parts_g + i_n.to(tl.int64) * M * R, b_g, o_m, o_r, R, M, R)
        if parts_dB is not None:
            acc_dB = dot(b_dy.T, load_tile(h, o_m, o_r, R, M, R), acc_dB, PRECISION)
        if parts_dc is not None:
            acc_dc += tl.sum(b_dy.to(tl.float32), axis=0)
    if parts_dB is not None:
        store_tile(parts_dB + i_m.to(tl.int64) * N * R, s * acc_dB, o_n, o_r, R, N, R)
    if parts_dc is not None:
        tl.store(parts_dc + i_m.to(tl.int64) * N + o_n, acc_dc, mask=o_n < N)


def grad_dy(
    dy: Tensor, h: Tensor | None, B: Tensor | None, s: float | Tensor, need_g: bool, need_B: bool, need_c: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g = s·dy·B in B's dtype, dB in h's dtype, dc in float32, each if needed."""
    if not (need_g or need_B or need_c):
        return None, None, None
    M, N = dy.shape
    adapter = B if need_g else h if need_B else None
    R, dtype = (1, dy.dtype) if adapter is None else (adapter.shape[1], adapter.dtype)

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        strips = triton.cdiv(N, tile.columns)
        count, part_rows = tuning.splits(M, tile.rows, strips, 2 * tuning.gpu(dy.device).processors)
        parts_g = new_parts(strips, (M, R), dtype, dy.device) if need_g else None
        parts_dB = new_parts(count, (N, R), dtype, dy.device) if need_B else None
        parts_dc = new_parts(count, (N,), torch.float32, dy.device) if need_c else None
        grad_dy_kernel[(strips, count)](
            dy, h, B, parts_g, parts_dB, parts_dc, s, M, N, R, dy.stride(0), part_rows,
            PRECISION=tuning.precision(dy.dtype), BM=tile.rows, BN=tile.columns, BR=tuning.padded_rank(R),
            **tile.options(),
        )  # fmt: skip
        g, dB, dc = sum_parts((parts_g, dtype), (parts_dB, dtype), (parts_dc, torch.float32))
        return g, dB, dc

    return first_that_compiles("grad_dy", tuning.arithmetic(dy.dtype, dtype), R, dy.device, run)
