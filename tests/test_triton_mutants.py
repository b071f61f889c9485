"""Tests that cannot fail are defects: each of these broken kernels must be caught by the tolerance rule."""

from functools import cache
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, broken_results, contract
from triton_interpreter import DEVICE

from lora_kernels import dropout_mask, use_backend
from lora_kernels.backends.triton import linear
from lora_kernels.backends.triton.kernels import grad_dy, grad_x, mask, prefill, project, sums, tiles

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
    return [Case(M=M, K=600, N=N, R=12, p=0.3, dtype=dtype) for M, N in ((17, 264), (129, 40))]


@cache
def nothing_is_caught_without_one(dtype: torch.dtype) -> bool:
    return not caught(*cases(dtype))


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize(("module", "name", "mutant", "broken"), MUTANTS)
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
