"""Tests that cannot fail are defects: each of these broken kernels must be caught by the tolerance rule."""

import pytest
import torch
import triton
import triton.language as tl
from triton_case import FP16, FP32, Case
from triton_interpreter import DEVICE

from lora_kernels.backends.triton import backward, blocks, dropout, forward, wide_rank

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")


@triton.jit
def dot_one_percent_small(a, b, acc, PRECISION: tl.constexpr):
    return acc + 0.99 * tl.dot(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def scalar_one_percent_small(s):
    return 0.99 * s


@triton.jit
def keep_tile_of_the_next_row(seed, edge, o_row, column, COLUMNS: tl.constexpr):
    return blocks_keep_tile(seed, edge, o_row + 1, column, COLUMNS)


@triton.jit
def keep_tile_of_other_columns(seed, edge, o_row, column, COLUMNS: tl.constexpr):
    return blocks_keep_tile(seed, edge, o_row, column + 8, COLUMNS)


@triton.jit
def keep_tile_that_keeps_one_more(seed, edge, o_row, column, COLUMNS: tl.constexpr):
    first = (o_row == 3)[:, None] & (column + tl.arange(0, COLUMNS) == first_dropped)[None, :]
    return blocks_keep_tile(seed, edge, o_row, column, COLUMNS) | first


@triton.jit
def sum_block_without_the_last_part(parts, out, i_block, size, count, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    blocks_sum_block(parts, out, i_block, size, count - 1, BLOCK, DEPTH)


@triton.jit
def store_tile_without_the_last_row(p, value, o_row, o_column, stride, rows, columns):
    blocks_store_tile(p, value, o_row, o_column, stride, rows - 1, columns)


@triton.jit
def load_tile_one_column_further(p, o_row, o_column, stride, rows, columns):
    return blocks_load_tile(p, o_row, (o_column + 1) % columns, stride, rows, columns)


blocks_keep_tile, blocks_sum_block = dropout.keep_tile, blocks.sum_block
blocks_store_tile, blocks_load_tile = blocks.store_tile, blocks.load_tile
first_dropped = int((dropout.mask_bits(4, 300, 0.3, Case.draw(1, 1, 1, 1).seed)[3] == 0).int().argmax())

MUTANTS: list[tuple[object, str, object, set[str]]] = [
    (forward, "dot", dot_one_percent_small, {"y", "h"}),
    (backward, "dot", dot_one_percent_small, {"dx", "dA", "dB"}),
    (forward, "scalar", scalar_one_percent_small, {"y"}),
    (backward, "scalar", scalar_one_percent_small, {"dx", "dA", "dB"}),
    (forward, "keep_tile", keep_tile_of_the_next_row, {"h"}),
    (forward, "keep_tile", keep_tile_of_other_columns, {"h"}),
    (forward, "keep_tile", keep_tile_that_keeps_one_more, {"h"}),
    (backward, "keep_tile", keep_tile_of_the_next_row, {"dx", "dA"}),
    (backward, "keep_tile", keep_tile_that_keeps_one_more, {"dx", "dA"}),
    (blocks, "sum_block", sum_block_without_the_last_part, {"h", "dx", "dA", "dB", "dc"}),
    (forward, "store_tile", store_tile_without_the_last_row, {"y", "h"}),
    (backward, "store_tile", store_tile_without_the_last_row, {"dx", "dA", "dB"}),
    (forward, "load_tile", load_tile_one_column_further, {"y", "h"}),
    (backward, "load_tile", load_tile_one_column_further, {"dx", "dA", "dB"}),
]


def caught(case: Case) -> set[str]:
    """The results that break the rule."""
    found = set()
    for name, tensor in case.run().items():
        try:
            case.check({name: tensor})
        except AssertionError:
            found.add(name)
    return found


@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize(("module", "name", "mutant", "broken"), MUTANTS)
def test_a_broken_kernel_is_caught(
    module: object, name: str, mutant: object, broken: set[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (Case.draw(M, 600, N, 12, dtype, dtype) for M, N in ((17, 264), (129, 40)))  # K and N are split, then M
    assert not caught(few) | caught(many)
    monkeypatch.setattr(module, name, mutant)
    assert broken <= caught(few) | caught(many)


def test_a_broken_wide_rank_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case, drop = Case.draw(17, 72, 80, 80), wide_rank.drop
    monkeypatch.setattr(wide_rank, "drop", lambda *a, first_row, **k: drop(*a, first_row=first_row + 1, **k))
    assert {"y", "h", "dx", "dA", "dB"} <= caught(case)
