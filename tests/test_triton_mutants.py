"""Tests that cannot fail are defects: each of these broken kernels must be caught by the tolerance rule."""

import itertools
from functools import cache
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, Problem, broken_results, contract
from triton_interpreter import DEVICE

from lora_kernels import dropout_mask, use_backend
from lora_kernels.backends.triton import linear
from lora_kernels.backends.triton.kernels import (
    grad_dy,
    grad_x,
    magnitude,
    magnitude_backward,
    mask,
    nf4_dequantize,
    prefill,
    project,
    row_norm,
    sums,
    tiles,
)

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
FP16, FP32 = torch.float16, torch.float32


@triton.jit
def dot_one_percent_small(a, b, acc, PRECISION: tl.constexpr):
    return 0.99 * tl.dot(a.to(tl.float32), b.to(tl.float32)) + (0.0 if acc is None else acc)


@triton.jit
def scalar_one_percent_small(s):
    return 0.99 * s


@triton.jit
def keep_tile_of_the_next_row(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    return right_keep_tile(seed, edge, o_row + 1, column, OFFSET, COLUMNS)


@triton.jit
def keep_tile_of_other_columns(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    return right_keep_tile(seed, edge, o_row, column + 8, OFFSET, COLUMNS)


@triton.jit
def keep_tile_that_keeps_one_more(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    first = (o_row == 3)[:, None] & (column + tl.arange(0, COLUMNS) == first_dropped)[None, :]
    return right_keep_tile(seed, edge, o_row, column, OFFSET, COLUMNS) | first


@triton.jit
def sum_block_without_the_last_part(parts, out, i_block, size, count, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    right_sum_block(parts, out, i_block, size, count - 1, BLOCK, DEPTH)


@triton.jit
def store_tile_without_the_last_row(p, value, o_row, o_column, stride, rows, columns):
    right_store_tile(p, value, o_row, o_column, stride, rows - 1, columns)


@triton.jit
def load_tile_one_column_further(p, o_row, o_column, stride, rows, columns):
    return right_load_tile(p, o_row, (o_column + 1) % columns, stride, rows, columns)


@triton.jit
def update_one_percent_small(b_B, b_A, PRECISION: tl.constexpr):
    return 0.99 * right_update_of(b_B, b_A, PRECISION)


@triton.jit
def decoded_tile_of_the_next_blocks(
    codes, pairs, absmax, nested_absmax, nested_map, nested_offset, o_row, k, K, BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr,
    BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    args = (codes, pairs, absmax + 1, nested_absmax, nested_map, nested_offset)
    return right_decoded_tile(*args, o_row, k, K, BLOCKSIZE, SPAN, BD, BC)


@triton.jit
def over_one_percent_small(a, n):
    return 0.99 * right_over(a, n)


@triton.jit
def over_without_the_guard(a, n):
    return a / n


right_update_of, right_decoded_tile, right_over = row_norm.update_of, nf4_dequantize.decoded_tile, magnitude.over
right_keep_tile, right_sum_block = mask.keep_tile, sums.sum_block
right_store_tile, right_load_tile = tiles.store_tile, tiles.load_tile
first_dropped = int((dropout_mask(4, 300, 0.3, Case().seed)[3] == 0).int().argmax())

MUTANTS: list[tuple[ModuleType, str, object, set[str]]] = [
    (project, "dot", dot_one_percent_small, {"h"}),
    (prefill, "dot", dot_one_percent_small, {"y"}),
    (prefill, "scalar", scalar_one_percent_small, {"y"}),
    (grad_dy, "dot", dot_one_percent_small, {"dx", "dA", "dB"}),
    (grad_dy, "scalar", scalar_one_percent_small, {"dx", "dA", "dB"}),
    (grad_x, "dot", dot_one_percent_small, {"dx", "dA"}),
    (project, "keep_tile", keep_tile_of_the_next_row, {"h"}),
    (project, "keep_tile", keep_tile_of_other_columns, {"h"}),
    (project, "keep_tile", keep_tile_that_keeps_one_more, {"h"}),
    (grad_x, "keep_tile", keep_tile_of_the_next_row, {"dx", "dA"}),
    (grad_x, "keep_tile", keep_tile_that_keeps_one_more, {"dx", "dA"}),
    (sums, "sum_block", sum_block_without_the_last_part, {"h", "dx", "dA", "dB", "dc"}),
    (project, "store_tile", store_tile_without_the_last_row, {"h"}),
    (prefill, "store_tile", store_tile_without_the_last_row, {"y"}),
    (grad_dy, "store_tile", store_tile_without_the_last_row, {"dx", "dA", "dB"}),
    (grad_x, "store_tile", store_tile_without_the_last_row, {"dx", "dA"}),
    (project, "load_tile", load_tile_one_column_further, {"h"}),
    (prefill, "load_tile", load_tile_one_column_further, {"y"}),
    (grad_dy, "load_tile", load_tile_one_column_further, {"dx", "dA", "dB"}),
    (grad_x, "load_tile", load_tile_one_column_further, {"dx", "dA"}),
]


DORA_MUTANTS: list[tuple[ModuleType, str, object, set[str]]] = [
    (row_norm, "update_of", update_one_percent_small, {"y", "dx", "dA", "dB", "dm"}),
    (row_norm, "scalar", scalar_one_percent_small, {"y", "dx", "dA", "dB", "dm"}),
    (row_norm, "load_tile", load_tile_one_column_further, {"y", "dx", "dA", "dB", "dm"}),
    (row_norm, "decoded_tile", decoded_tile_of_the_next_blocks, {"y", "dx", "dA", "dB", "dm"}),
    (magnitude, "over", over_one_percent_small, {"y"}),
    (magnitude, "over", over_without_the_guard, {"y"}),
    (magnitude, "load_tile", load_tile_one_column_further, {"y"}),
    (magnitude, "store_tile", store_tile_without_the_last_row, {"y"}),
    (magnitude_backward, "over", over_one_percent_small, {"dx", "dA", "dB", "dm"}),
    (magnitude_backward, "over", over_without_the_guard, {"dx", "dA", "dm"}),
    (magnitude_backward, "load_tile", load_tile_one_column_further, {"dx", "dA", "dB", "dm", "dc"}),
    (magnitude_backward, "store_tile", store_tile_without_the_last_row, {"dx", "dA", "dB"}),
    (sums, "sum_block", sum_block_without_the_last_part, {"y", "dm", "dc"}),
]


def caught(*cases: Case) -> set[str]:
    """The results that break the rule."""
    found = set()
    with use_backend("triton"):
        for case in cases:
            torch.manual_seed(0)
            problem = case.draw()
            found |= set(broken_results(problem, contract(problem)))
    return found


def cases(dtype: torch.dtype) -> list[Case]:
    """K and N are split, then M."""
    return [Case(M=M, K=300, N=N, R=12, p=0.3, dtype=dtype) for M, N in ((17, 264), (70, 40))]


@cache
def nothing_is_caught_without_one(dtype: torch.dtype) -> bool:
    return not caught(*cases(dtype))


@pytest.mark.parametrize(
    ("module", "name", "mutant", "broken", "dtype"),
    [(*mutant, dtype) for mutant, dtype in zip(MUTANTS, itertools.cycle([FP16, FP32]), strict=False)],
)
def test_a_broken_kernel_is_caught(
    module: ModuleType, name: str, mutant: object, broken: set[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nothing_is_caught_without_one(dtype)
    monkeypatch.setattr(module, name, mutant)
    assert broken <= caught(*cases(dtype))


def test_a_broken_mask_of_a_wide_rank_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case, drop = Case(M=17, K=72, N=80, R=80, p=0.3, dtype=FP16), linear.drop
    assert not caught(case)
    monkeypatch.setattr(linear, "drop", lambda *a, first_row, **k: drop(*a, first_row=first_row + 1, **k))
    assert {"y", "h", "dx", "dA", "dB"} <= caught(case)


@cache
def dora_problem(quant_type: str | None) -> Problem:
    """K is split, for the norm too, and M; a row of a dense W + s·B·A is zero. Nothing of it breaks the rule."""
    problem = Case(M=70, K=320, N=40, R=12, dtype=FP16, dora=True, quant_type=quant_type).draw()
    if quant_type is None:
        problem.W.data[3] = problem.B.data[3] = 0
    assert not broken_by_triton(problem)
    return problem


def broken_by_triton(problem: Problem) -> set[str]:
    with use_backend("triton"):
        return set(broken_results(problem, contract(problem)))


@pytest.mark.parametrize(("module", "name", "mutant", "broken"), DORA_MUTANTS)
def test_a_broken_kernel_of_a_magnitude_is_caught(
    module: ModuleType, name: str, mutant: object, broken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = dora_problem("nf4" if name == "decoded_tile" else None)
    monkeypatch.setattr(module, name, mutant)
    assert broken <= broken_by_triton(problem)
