"""Equations 16 and 17 (reference/eggroll.py): the factors are drawn where they are multiplied, and never in memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....normal import table
from ..launch import Launch, dtype_of, kept
from ..tuning import Tile
from .mask import words_tile
from .tiles import load_tile, store_tile

PROJECT, ADD = Tile(32, 128, 4, 2), Tile(32, 128, 4)
GRADIENT, PAIRS = Tile(32, 64, 4, 2), 16  # of dW, and how many factors' rows it multiplies at a time


@triton.jit
def normal_tile(seed, table, o_row, column, offset_low, offset_high, COLUMNS: tl.constexpr):
    """normal(seed, row, column) as float32[rows, COLUMNS]; of the table, which is antisymmetric, the upper half is read."""
    offset_low, offset_high = offset_low.to(tl.uint32, bitcast=True), offset_high.to(tl.uint32, bitcast=True)
    words = words_tile(seed, o_row, column, offset_low, offset_high, COLUMNS)
    lanes = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (o_row.shape[0], COLUMNS)).to(tl.int32)
    upper = lanes >= 32768
    value = tl.load(table + tl.where(upper, lanes, 65535 - lanes))
    return tl.where(upper, value, -value)


@triton.jit(do_not_specialize=["offset_low", "offset_high", "M", "tiles"])
def eggroll_project_kernel(
    x, table, h, seed, offset_low, offset_high, factor, M, K, tiles, RANK: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """h = ±factor·x·A_jᵀ of the rows of a pair j, 2·M of them, the second half with a minus; h[P·M, RANK] in float32."""
    i_pair, i_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_m, o_r, seed = i_m * BM + tl.arange(0, BM), tl.arange(0, BR), tl.load(seed)
    first, acc = i_pair.to(tl.int64) * 2 * M, tl.zeros([BM, BR], tl.float32)
    for k in range(0, K, BK):
        b_x = load_tile(x + first * K, o_m, k + tl.arange(0, BK), K, 2 * M, K).to(tl.float32)
        for r in range(RANK):
            A_r = normal_tile(seed, table, tl.full([1], i_pair * RANK + r, tl.int32), k, offset_low, offset_high, BK)
            acc += tl.where((o_r == r)[None, :], tl.sum(b_x * A_r, axis=1)[:, None], 0.0)
    acc *= tl.where(o_m < M, factor, -factor)[:, None]
    store_tile(h + first * RANK, acc, o_m, o_r, RANK, 2 * M, RANK)


@triton.jit(do_not_specialize=["offset_low", "offset_high", "M", "tiles"])
def eggroll_add_kernel(
    h, table, c, y, seed, offset_low, offset_high, M, N, tiles, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """y = h·B_j + c of the rows of a pair j; c may be None."""
    i_pair, i_m = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    n, seed = tl.program_id(1) * BN, tl.load(seed)
    o_m, o_n, first = i_m * BM + tl.arange(0, BM), n + tl.arange(0, BN), i_pair.to(tl.int64) * 2 * M
    acc = tl.zeros([BM, BN], tl.float32)
    for r in range(RANK):
        B_r = normal_tile(seed, table, tl.full([1], i_pair * RANK + r, tl.int32), n, offset_low, offset_high, BN)
        acc += tl.load(h + (first + o_m) * RANK + r, mask=o_m < 2 * M, other=0.0)[:, None] * B_r
    if c is not None:
        acc += tl.load(c + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y + first * N, acc, o_m, o_n, N, 2 * M, N)


@triton.jit(do_not_specialize=["low_A", "high_A", "low_B", "high_B", "rows"])
def eggroll_gradient_kernel(
    differences, table, dW, seed, low_A, high_A, low_B, high_B, rows, N, K, RANK: tl.constexpr, BP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of dW = Σ_j differences[j]·B_j·A_j, over the `rows` = pairs · RANK rows of the factors."""
    n, k, seed = tl.program_id(0) * BM, tl.program_id(1) * BK, tl.load(seed)
    acc = tl.zeros([BM, BK], tl.float32)
    for row in range(0, rows, BP):
        o_row = row + tl.arange(0, BP)
        difference = tl.load(differences + o_row // RANK, mask=o_row < rows, other=0.0)
        b_B = normal_tile(seed, table, o_row, n, low_B, high_B, BM) * difference[:, None]
        acc = tl.dot(b_B.T, normal_tile(seed, table, o_row, k, low_A, high_A, BK), acc, input_precision="ieee")
    store_tile(dW, acc, n + tl.arange(0, BM), k + tl.arange(0, BK), K, N, K)


def low_rank_term(x: Tensor, N: int, c: Tensor | None, P: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """(s_i/√r)·(x_i·A_jᵀ)·B_jᵀ + c of equation 16 in x's dtype, for x[P·M, K] without gaps."""
    M, K, dtype = len(x) // P, x.shape[1], x.dtype
    h, y = x.new_empty(len(x), r, dtype=torch.float32), x.new_empty(len(x), N)
    (low_A, high_A), (low_B, high_B) = words(2 * offset), words(2 * offset + 1)
    project, add = projections(dtype, K, r), sums(dtype, dtype_of(c), N, r)
    tiles = -(-2 * M // PROJECT.rows)
    project((P // 2 * tiles, 1), x, table(x.device), h, seed, low_A, high_A, s / r**0.5, M, K, tiles)
    tiles = -(-2 * M // ADD.rows)
    add((P // 2 * tiles, -(-N // ADD.columns)), h, table(x.device), c, y, seed, low_B, high_B, M, N, tiles)
    return y


def gradient(f: Tensor, N: int, K: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """Equation 17 for float32 fitness."""
    differences, dW = (f[::2] - f[1::2]) / (len(f) * s * r**0.5), f.new_empty(N, K)
    grid = -(-N // GRADIENT.rows), -(-K // GRADIENT.columns)
    numbers = (*words(2 * offset), *words(2 * offset + 1), len(differences) * r)
    products(N, K, r)(grid, differences, table(f.device), dW, seed, *numbers, N, K)
    return dW


def words(offset: int) -> tuple[int, int]:
    """The two halves of an offset as signed integers of 32 bits."""
    low, high = offset & 0xFFFFFFFF, offset >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@kept
def projections(dtype: torch.dtype, K: int, r: int) -> Launch:
    tile = PROJECT
    return Launch(eggroll_project_kernel, tile.options(), RANK=r, BR=triton.next_power_of_2(r), BM=tile.rows, BK=tile.columns)


@kept
def sums(dtype: torch.dtype, of_c: torch.dtype | None, N: int, r: int) -> Launch:
    return Launch(eggroll_add_kernel, ADD.options(), RANK=r, BM=ADD.rows, BN=ADD.columns)


@kept
def products(N: int, K: int, r: int) -> Launch:
    tile = GRADIENT
    return Launch(eggroll_gradient_kernel, tile.options(), RANK=r, BP=PAIRS, BM=tile.rows, BK=tile.columns)
