"""Equation 5, and dx's low-rank term of 4, in one pass over x with one mask."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import keep_scale
from ....values import Dropout
from .. import tuning
from ..compilation import first_that_compiles
from ..tuning import Tile
from .mask import edge, keep_tile
from .sums import new_parts, sum_parts
from .tiles import dot, load_tile, store_tile


@triton.jit(do_not_specialize=["M", "edge"])
def grad_x_kernel(
    x, g, A, dx, parts_dA, seed, edge, keep_scale, M, K, R: tl.constexpr, stride_x, part_rows,
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
            b_dx = (keep_scale * dot(b_g, b_A, None, PRECISION)).to(dx.dtype.element_ty)
            if DROP:
                b_dx = tl.where(keep, b_dx, 0.0)
            store_tile(dx, b_dx, o_m, o_k, K, M, K)
    if parts_dA is not None:
        store_tile(parts_dA + i_m.to(tl.int64) * R * K, keep_scale * tl.trans(acc_dA), o_r, o_k, K, R, K)


def grad_x(
    x: Tensor | None,
    g: Tensor | None,
    A: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """undrop(g·A) in `dtype` and dA in g's dtype, each if needed."""
    if not (need_x or need_A):
        return None, None
    (M, R), K = g.shape, x.shape[1] if need_A else A.shape[1]
    stride_x = x.stride(0) if need_A else K
    p, seed = (0.0, None) if dropout is None else (dropout.p, dropout.seed)

    def run(tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        strips = triton.cdiv(K, tile.columns)
        count, part_rows = tuning.splits(M, tile.rows, strips, 2 * tuning.gpu(g.device).processors)
        dx = torch.empty(M, K, dtype=dtype, device=g.device) if need_x else None
        parts_dA = new_parts(count, (R, K), g.dtype, g.device) if need_A else None
        grad_x_kernel[(strips, count)](
            x, g, A, dx, parts_dA, seed, edge(p), keep_scale(p), M, K, R, stride_x, part_rows,
            DROP=seed is not None, PRECISION=tuning.precision(dtype), BM=tile.rows, BK=tile.columns, BR=tuning.padded_rank(R),
            **tile.options(),
        )  # fmt: skip
        return dx, sum_parts((parts_dA, g.dtype))[0]

    return first_that_compiles("grad_x", tuning.arithmetic(dtype, g.dtype), R, g.device, run)
