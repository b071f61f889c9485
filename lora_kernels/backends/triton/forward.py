"""Equations 1 and 2: h in one pass over x, then y."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..torch.linear import add_product
from . import gemm, tuning
from .blocks import dot, load_tile, new_parts, row_major, scalar, store_tile, sum_parts
from .dropout import drops, edge, keep_scale, keep_tile
from .tuning import Tile


@triton.jit(do_not_specialize=["M", "edge"])
def project_kernel(
    x, A, parts, seed, edge, keep_scale, M, K, R, stride_x, part_columns,
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


@triton.jit(do_not_specialize=["M"])
def prefill_kernel(
    h, B, c, y, s, M, N, R, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """y = s·h·Bᵀ + c, to which the base product is then added in place: the low-rank term is rounded once."""
    o_m, o_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    o_r = tl.arange(0, BR)
    b_h, b_B = load_tile(h, o_m, o_r, R, M, R), load_tile(B, o_n, o_r, R, N, R)
    acc = scalar(s) * dot(b_h, b_B.T, tl.zeros([BM, BN], tl.float32), PRECISION)
    if c is not None:
        acc += tl.load(c + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, acc, o_m, o_n, N, M, N)


def lora_forward(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 for M > 0 and R <= MAX_RANK: y[M,N] in x's dtype, h[M,R] in A's."""
    x, A, B, c = row_major(x), A.contiguous(), B.contiguous(), None if c is None else c.contiguous()
    h = project(x, A, p, seed)
    if tuning.dataflow(x, W, "forward") == "fused":
        return gemm.forward(x, W, h, B, s, c), h
    return add_product(prefill(h, B, s, c, x.dtype), x, W.T), h


def project(x: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Equation 1. Where M is small, K is split so that every processor reads a part of x."""
    (M, K), R = x.shape, A.shape[0]
    DROP = drops(p)

    def run(tile: Tile) -> Tensor:
        programs = triton.cdiv(M, tile.rows)
        count, part_columns = tuning.splits(K, max(256, tile.columns), programs, tuning.gpu(x.device).processors)
        parts = new_parts(count, (M, R), A.dtype, x.device)
        project_kernel[(programs, count)](
            x, A, parts, seed if DROP else None, edge(p), keep_scale(p), M, K, R, x.stride(0), part_columns,
            DROP=DROP, PRECISION=tuning.precision(x.dtype), BM=tile.rows, BK=tile.columns, BR=tuning.padded_rank(R),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return sum_parts((parts, A.dtype))[0]  # type: ignore[return-value]

    return tuning.first_that_compiles("project", tuning.arithmetic(x.dtype, A.dtype), R, x.device, run)


def prefill(h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s·h·Bᵀ + c as [M, N] of `dtype`."""
    (M, R), N = h.shape, B.shape[0]

    def run(tile: Tile) -> Tensor:
        y = torch.empty(M, N, dtype=dtype, device=h.device)
        prefill_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(N, tile.columns))](
            h, B, c, y, s, M, N, R, PRECISION=tuning.precision(dtype), BM=tile.rows, BN=tile.columns,
            BR=tuning.padded_rank(R), num_warps=tile.warps,
        )  # fmt: skip
        return y

    return tuning.first_that_compiles("prefill", tuning.arithmetic(dtype, B.dtype), R, h.device, run)
