"""Equation 1: h in one pass over x."""

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
def project_kernel(
    x, A, parts, seed, edge, keep_scale, M, K, R: tl.constexpr, stride_x, part_columns,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """h = drop(x)·Aᵀ: parts[i_k, M, R] of one range of columns each; a program owns BM rows of one range."""
    i_m, i_k = tl.program_id(0), tl.program_id(1)
    o_m, o_r = i_m * BM + tl.arange(0, BM), tl.arange(0, BR)
    acc = tl.zeros([BM, BR], tl.float32)
    if DROP:
        seed = tl.load(seed)
    for k in range(i_k * part_columns, tl.minimum(K, (i_k + 1) * part_columns), BK):
        o_k = k + tl.arange(0, BK)
        b_x = load_tile(x, o_m, o_k, stride_x, M, K)
        if DROP:
            b_x = tl.where(keep_tile(seed, edge, o_m, k, BK), b_x, 0.0)
        acc = dot(b_x, load_tile(A, o_r, o_k, K, R, K).T, acc, PRECISION)
    store_tile(parts + i_k.to(tl.int64) * M * R, acc * keep_scale, o_m, o_r, R, M, R)


def project(x: Tensor, A: Tensor, dropout: Dropout | None) -> Tensor:
    """Equation 1. Where M is small, K is split so that every processor reads parts of x."""
    (M, K), R = x.shape, A.shape[0]
    p, seed = (0.0, None) if dropout is None else (dropout.p, dropout.seed)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(M, tile.rows)
        count, part_columns = tuning.splits(K, max(256, tile.columns), programs, 2 * tuning.gpu(x.device).processors)
        parts = new_parts(count, (M, R), A.dtype, x.device)
        project_kernel[(programs, count)](
            x, A, parts, seed, edge(p), keep_scale(p), M, K, R, x.stride(0), part_columns,
            DROP=seed is not None, PRECISION=tuning.precision(x.dtype), BM=tile.rows, BK=tile.columns, BR=tuning.padded_rank(R),
            **tile.options(),
        )  # fmt: skip
        return sum_parts((parts, A.dtype))[0]  # type: ignore[return-value]

    return first_that_compiles("project", tuning.arithmetic(x.dtype, A.dtype), R, x.device, run)
