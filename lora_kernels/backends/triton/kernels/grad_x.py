"""Equation 5, and dx's low-rank term of 4, in one pass over x with one mask."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import keep_scale
from ....scratch import slices
from ....values import Dropout
from .. import tuning
from ..launch import call, two
from ..tuning import Tile
from .mask import edge, keep_tile
from .sums import new_parts, sum_parts
from .tiles import dot, load_tile, store_tile


@triton.jit(do_not_specialize=["first_row", "M", "edge"])
def grad_x_kernel(
    x, g, A, dx, parts_dA, seed, edge, keep_scale, first_row, M, K, R: tl.constexpr, stride_x, part_rows,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dx = undrop(g·A), dA = gᵀ·drop(x): a strip of BK columns and a range of rows, whose mask serves both.

    parts_dA[i_m, R, K]; dx or parts_dA may be None, and is not computed. Row 0 is row `first_row` of the mask.
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
            keep = keep_tile(seed, edge, first_row + o_m, i_k * BK, BK)
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


Two = tuple[Tensor | None, Tensor | None]
Add = Callable[[Tensor, slice | None], object]


def grad_x(
    x: Tensor | None,
    g: Tensor | None,
    A: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
    need_x: bool,
    need_A: bool,
    add: Add | None = None,
) -> Two:
    """undrop(g·A) in `dtype` and dA in g's dtype, each if needed.

    add(dx[rows], rows) adds what else dx is: of chunks of rows, one after the other, which are still in L2; rows None: of all.
    """
    if not (need_x or need_A):
        return None, None
    A, x = A if need_x else None, x if need_A else None
    K, stride_x = (A.shape[1], 0) if x is None else (x.shape[1], x.stride(0))
    p, seed = (None, None) if dropout is None else (dropout.p, dropout.seed)
    key = g.device, dtype, g.dtype, g.shape[1], K, stride_x, p, need_x, need_A, tuning.precision(dtype)
    return call("grad_x", gradients, key, x, g, A, seed, add if need_x else None)


def gradients(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    K: int,
    stride_x: int,
    p: float | None,
    need_x: bool,
    need_A: bool,
    precision: str,
) -> Callable[..., Two]:
    """run(x, g, A, seed, add): dx, or its low-rank term without `add`, and dA with this tile."""
    launches = two(
        grad_x_kernel, tile.options(), DROP=p is not None, PRECISION=precision, BM=tile.rows, BK=tile.columns,
        BR=tuning.padded_rank(R),
    )  # fmt: skip
    gpu, strips = tuning.gpu(device), -(-K // tile.columns)
    bits, scale, chunk = edge(p or 0.0), keep_scale(p or 0.0), tuning.chunk_rows(K, dtype.itemsize, gpu)

    def run(x: Tensor | None, g: Tensor, A: Tensor | None, seed: Tensor | None, add: Add | None) -> Two:
        M = g.shape[0]
        if add is not None and chunk < M:
            return in_chunks(x, g, A, seed, add)
        count, part_rows = tuning.splits(M, tile.rows, strips, 2 * gpu.processors)
        dx = torch.empty(M, K, dtype=dtype, device=device) if need_x else None
        parts_dA = new_parts(count, R, K, dtype=adapter, device=device) if need_A else None
        launches[count > 1](
            (strips, count), x, g, A, dx, parts_dA, seed, bits, scale, 0, M, K, R, stride_x, part_rows
        )  # fmt: skip
        if add is not None:
            add(dx, None)
        return dx, parts_dA if count == 1 else sum_parts((parts_dA, count, adapter))[0]

    def in_chunks(x: Tensor | None, g: Tensor, A: Tensor | None, seed: Tensor | None, add: Add) -> Two:
        chunks, part = slices(len(g), chunk), 0
        cuts = [tuning.splits(rows.stop - rows.start, tile.rows, strips, 2 * gpu.processors) for rows in chunks]
        dx, count = torch.empty(len(g), K, dtype=dtype, device=device), sum([parts for parts, _ in cuts])
        parts_dA = new_parts(count, R, K, dtype=adapter, device=device) if need_A else None
        for rows, (parts, part_rows) in zip(chunks, cuts, strict=True):
            own_x, own_parts = (None, None) if x is None or parts_dA is None else (x[rows], parts_dA[part:])
            launches[1](
                (strips, parts), own_x, g[rows], A, dx[rows], own_parts, seed, bits, scale, rows.start, rows.stop - rows.start,
                K, R, stride_x, part_rows,
            )  # fmt: skip
            add(dx[rows], rows)
            part += parts
        return dx, sum_parts((parts_dA, count, adapter))[0]

    return run
