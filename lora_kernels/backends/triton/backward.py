"""Equations 3 to 6: g, dB and dc in one pass over dy; dA and dx's low-rank term in one pass over x with one mask."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch.linear import Needs, add_product
from . import gemm, tuning
from .blocks import dot, load_tile, new_parts, row_major, scalar, store_tile, sum_parts
from .dropout import drops, edge, keep_scale, keep_tile
from .tuning import Tile


@triton.jit(do_not_specialize=["M"])
def grad_dy_kernel(
    dy, h, B, parts_g, parts_dB, parts_dc, s, M, N, R, stride_dy, part_rows,
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
            b_g = s * dot(b_dy, b_B, tl.zeros([BM, BR], tl.float32), PRECISION)
            store_tile(parts_g + i_n.to(tl.int64) * M * R, b_g, o_m, o_r, R, M, R)
        if parts_dB is not None:
            acc_dB = dot(b_dy.T, load_tile(h, o_m, o_r, R, M, R), acc_dB, PRECISION)
        if parts_dc is not None:
            acc_dc += tl.sum(b_dy.to(tl.float32), axis=0)
    if parts_dB is not None:
        store_tile(parts_dB + i_m.to(tl.int64) * N * R, s * acc_dB, o_n, o_r, R, N, R)
    if parts_dc is not None:
        tl.store(parts_dc + i_m.to(tl.int64) * N + o_n, acc_dc, mask=o_n < N)


@triton.jit(do_not_specialize=["M", "edge"])
def grad_x_kernel(
    x, g, A, dx, parts_dA, seed, edge, keep_scale, M, K, R, stride_x, part_rows,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = undrop(g·A), dA = gᵀ·drop(x): a strip of BK columns and a range of rows, whose mask serves both.

    parts_dA[i_m, R, K]; dx or parts_dA may be None, and is not computed.
    """
    i_k, i_m = tl.program_id(0), tl.program_id(1)
    o_k, o_r = i_k * BK + tl.arange(0, BK), tl.arange(0, BR)
    if DROP:
        seed = tl.load(seed)
    if dx is not None:
        b_A = load_tile(A, o_r, o_k, K, R, K)
    acc_dA = tl.zeros([BK, BR], tl.float32)
    for m in range(i_m * part_rows, tl.minimum(M, (i_m + 1) * part_rows), BM):
        o_m = m + tl.arange(0, BM)
        b_g = load_tile(g, o_m, o_r, R, M, R)
        if DROP:
            keep = keep_tile(seed, edge, o_m, i_k * BK, BK)
        if parts_dA is not None:
            b_x = load_tile(x, o_m, o_k, stride_x, M, K)
            if DROP:
                b_x = tl.where(keep, b_x, 0.0)
            acc_dA = dot(b_x.T, b_g, acc_dA, PRECISION)
        if dx is not None:
            b_dx = (keep_scale * dot(b_g, b_A, tl.zeros([BM, BK], tl.float32), PRECISION)).to(dx.dtype.element_ty)
            if DROP:
                b_dx = tl.where(keep, b_dx, 0.0)
            store_tile(dx, b_dx, o_m, o_k, K, M, K)
    if parts_dA is not None:
        store_tile(parts_dA + i_m.to(tl.int64) * R * K, keep_scale * tl.trans(acc_dA), o_r, o_k, K, R, K)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    h: Tensor | None,
    s: float | Tensor,
    p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 3 to 6 for M > 0 and R <= MAX_RANK, as reference.lora_backward; dc is in float32."""
    dy, x = row_major(dy), None if x is None else row_major(x)
    A, B, h = (None if t is None else t.contiguous() for t in (A, B, h))
    g, dB, dc = grad_dy(dy, h, B, s, needs)
    if needs.dx and tuning.dataflow(dy, W, "backward") == "fused":
        _, dA = grad_x(x, g, A, p, seed, needs._replace(dx=False), dy.dtype)
        return gemm.backward(dy, W, g, A, p, seed), dA, dB, dc
    dx, dA = grad_x(x, g, A, p, seed, needs, dy.dtype)
    return add_product(dx, dy, W) if needs.dx else None, dA, dB, dc


def grad_dy(
    dy: Tensor, h: Tensor | None, B: Tensor | None, s: float | Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """g = s·dy·B in B's dtype where dx or dA reads it, dB in h's dtype, dc in float32."""
    need_g, (M, N) = needs.dx or needs.dA, dy.shape
    if not (need_g or needs.dB or needs.dc):
        return None, None, None
    adapter = B if need_g else h if needs.dB else None
    R, dtype = (1, dy.dtype) if adapter is None else (adapter.shape[1], adapter.dtype)

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        strips = triton.cdiv(N, tile.columns)
        count, part_rows = tuning.splits(M, tile.rows, strips, 2 * tuning.gpu(dy.device).processors)
        parts_g = new_parts(strips, (M, R), dtype, dy.device) if need_g else None
        parts_dB = new_parts(count, (N, R), dtype, dy.device) if needs.dB else None
        parts_dc = new_parts(count, (N,), torch.float32, dy.device) if needs.dc else None
        grad_dy_kernel[(strips, count)](
            dy, h, B, parts_g, parts_dB, parts_dc, s, M, N, R, dy.stride(0), part_rows,
            PRECISION=tuning.precision(dy.dtype), BM=tile.rows, BN=tile.columns, BR=tuning.padded_rank(R),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        g, dB, dc = sum_parts((parts_g, dtype), (parts_dB, dtype), (parts_dc, torch.float32))
        return g, dB, dc

    return tuning.first_that_compiles("grad_dy", tuning.arithmetic(dy.dtype, dtype), R, dy.device, run)


def grad_x(
    x: Tensor | None,
    g: Tensor | None,
    A: Tensor | None,
    p: float,
    seed: Tensor | None,
    needs: Needs,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """undrop(g·A) in `dtype` and dA in g's dtype, each if needed."""
    if not (needs.dx or needs.dA):
        return None, None
    (M, R), K = g.shape, x.shape[1] if needs.dA else A.shape[1]
    DROP, stride_x = drops(p), x.stride(0) if needs.dA else K

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        strips = triton.cdiv(K, tile.columns)
        count, part_rows = tuning.splits(M, tile.rows, strips, 2 * tuning.gpu(g.device).processors)
        dx = torch.empty(M, K, dtype=dtype, device=g.device) if needs.dx else None
        parts_dA = new_parts(count, (R, K), g.dtype, g.device) if needs.dA else None
        grad_x_kernel[(strips, count)](
            x, g, A, dx, parts_dA, seed if DROP else None, edge(p), keep_scale(p), M, K, R, stride_x, part_rows,
            DROP=DROP, PRECISION=tuning.precision(dtype), BM=tile.rows, BK=tile.columns, BR=tuning.padded_rank(R),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return dx, sum_parts((parts_dA, g.dtype))[0]

    return tuning.first_that_compiles("grad_x", tuning.arithmetic(dtype, g.dtype), R, g.device, run)
