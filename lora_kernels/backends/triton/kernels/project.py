"""Equation 1: h in one pass over x."""

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
    p, seed = (None, None) if dropout is None else (dropout.p, dropout.seed)
    R, K = A.shape
    key = x.device, x.dtype, A.dtype, R, K, x.stride(0), p, tuning.precision(x.dtype)
    return call("project", projection, key, x, A, seed)


def projection(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    K: int,
    stride_x: int,
    p: float | None,
    precision: str,
) -> Callable[..., Tensor]:
    """run(x, A, seed): equation 1 with this tile."""
    launches = two(
        project_kernel, tile.options(), DROP=p is not None, PRECISION=precision, BM=tile.rows, BK=tile.columns,
        BR=tuning.padded_rank(R),
    )  # fmt: skip
    width, wanted = max(256, tile.columns), 2 * tuning.gpu(device).processors
    bits, scale = edge(p or 0.0), keep_scale(p or 0.0)

    def run(x: Tensor, A: Tensor, seed: Tensor | None) -> Tensor:
        M = x.shape[0]
        programs = -(-M // tile.rows)
        count, part_columns = tuning.splits(K, width, programs, wanted)
        parts = new_parts(count, M, R, dtype=adapter, device=device)
        launches[count > 1]((programs, count), x, A, parts, seed, bits, scale, M, K, R, stride_x, part_columns)
        return parts if count == 1 else sum_parts((parts, count, adapter))[0]  # type: ignore[return-value]

    return run
