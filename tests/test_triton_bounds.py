"""Kernels read what is theirs, at every remainder: NaN lies around each tensor and between its rows, and no load touches it."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, Problem, broken_results, contract
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton_interpreter import DEVICE

from lora_kernels import NF4Weight, Segments, lora_grouped_linear, quantize_nf4, use_backend
from lora_kernels.backends.triton import linear, tuning
from lora_kernels.backends.triton.kernels import (
    grad_dy,
    lowrank_product,
    nf4_product,
    project,
    row_norm,
    sums,
    tiles,
)

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="loads are watched in the interpreter")
right_load_tile, NAN = tiles.load_tile, float("nan")


def among_nan(t: Tensor, strided: bool) -> tuple[Tensor, Tensor]:
    """(t inside a larger tensor of NaN, that one); strided: with NaN between its rows too, which stay 16-byte aligned."""
    beside = NAN if t.is_floating_point() else 0
    if not strided:
        whole = torch.full((t.numel() + 4096,), beside, dtype=t.dtype)
        view = whole[2048 : 2048 + t.numel()].view(t.shape)
    else:
        whole = torch.full((t.shape[0] + 32, t.shape[1] + 64), beside, dtype=t.dtype)
        view = whole[16:-16, 32:-32]
    return view.copy_(t.detach()).requires_grad_(t.requires_grad), whole


def surrounded(problem: Problem) -> tuple[Problem, list[tuple[Tensor, Tensor]]]:
    pairs = {
        name: among_nan(getattr(problem, name), name in ("x", "dy", "W"))
        for name in ("x", "dy", "W", "A", "B", "c")
        if getattr(problem, name) is not None
    }
    return dataclasses.replace(problem, **{name: view for name, (view, _) in pairs.items()}), list(pairs.values())


@contextmanager
def loads() -> Iterator[list[np.ndarray]]:
    """A list that grows by the addresses which kernels load."""
    found: list[np.ndarray] = []
    load = InterpreterBuilder.create_masked_load

    def watched(self, pointers, mask, *rest, **options):
        found.append(pointers.data[np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)].ravel())
        return load(self, pointers, mask, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", watched)
        yield found


def strays(addresses: np.ndarray, view: Tensor, whole: Tensor) -> int:
    """How many loads are of `whole` and not of the view in it."""
    size, start = whole.element_size(), view.data_ptr() - whole.data_ptr()
    inside = (addresses >= whole.data_ptr()) & (addresses < whole.data_ptr() + whole.numel() * size)
    offsets = (addresses[inside].astype(np.int64) - whole.data_ptr() - start) // size
    if view.is_contiguous():
        return int(((offsets < 0) | (offsets >= view.numel())).sum())
    row, column = np.divmod(offsets, view.stride(0))
    return int(((row < 0) | (row >= view.shape[0]) | (column >= view.shape[1])).sum())


def wrong(case: Case) -> tuple[set[str], int]:
    """(the results that break the rule, the loads beside a tensor), h and g among the tensors."""
    problem, pairs = surrounded(case.draw())

    def new_parts(*sizes, **options):
        pairs.append(among_nan(sums.new_parts(*sizes, **options), strided=False))
        return pairs[-1][0]

    with use_backend("triton"), loads() as found, pytest.MonkeyPatch.context() as patch:
        for module in (project, grad_dy):
            patch.setattr(module, "new_parts", new_parts)
        broken = set(broken_results(problem, contract(problem)))
    addresses = np.concatenate(found)
    assert any(((addresses >= view.data_ptr()) & (addresses < view.data_ptr() + 64)).any() for view, _ in pairs)
    return broken, sum(strays(addresses, *pair) for pair in pairs)


CASE = Case(M=37, K=72, N=56, R=12, p=0.3, dtype=torch.float16)


@pytest.mark.parametrize("dataflow", ["prefill", "pointer", "tma"])
@pytest.mark.parametrize("sizes", [(37, 72, 56, 12), (5, 33, 65, 3), (17, 264, 40, 24)], ids=str)
def test_no_load_is_beside_a_tensor(dataflow: str, sizes: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    M, K, N, R = sizes
    if dataflow != "prefill":
        monkeypatch.setattr(linear.tuning, "dataflow", lambda a, W, direction: "lowrank_product")
        monkeypatch.setattr(tuning, "TMA_GPUS", ((8, 0),) if dataflow == "tma" else ())
    assert wrong(dataclasses.replace(CASE, M=M, K=K, N=N, R=R)) == (set(), 0)


def loads_beside(run: Callable[..., object], **tensors: Tensor) -> int:
    """How many loads are beside the tensors that `run` gets, each in a larger one."""
    pairs = {name: among_nan(t, strided=name in ("x", "dy")) for name, t in tensors.items()}
    with use_backend("triton"), loads() as found:
        run(**{name: view for name, (view, _) in pairs.items()})
    return sum(strays(np.concatenate(found), *pair) for pair in pairs.values())


def grouped(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, c: Tensor) -> None:
    """Both directions, with rows of no segment, whose programs have no adapter to load."""
    leaves = [t.requires_grad_() for t in (x, A, B, c)]
    segments = Segments.from_ids(torch.tensor([0, 0, 2, -1, -1]), 3)
    torch.autograd.grad(lora_grouped_linear(x, W, A, B, segments, bias=c, dropout_p=0.3, seed=1), leaves, dy)


def in_4_bits(w: NF4Weight, x: Tensor, h: Tensor, B: Tensor, A: Tensor, **tensors: Tensor) -> None:
    """The product, whose tiles have more rows than W, the norm by rows, and dequantising."""
    w = w.with_tensors(**tensors)
    nf4_product.product(x, w, h, B, 1.0, None)
    row_norm.row_norm(w, A, B, 1.0, x.dtype)
    w.dequantize()


def test_no_load_of_a_segment_is_beside_a_tensor() -> None:
    sizes = {"x": (5, 33), "dy": (5, 20), "W": (3, 20, 33), "A": (3, 3, 33), "B": (3, 20, 3), "c": (3, 20)}
    assert loads_beside(grouped, **{name: torch.randn(size).half() for name, size in sizes.items()}) == 0


@pytest.mark.parametrize("nested", [False, True])
def test_no_load_of_a_4_bit_weight_is_beside_it(nested: bool) -> None:
    w = quantize_nf4(torch.randn(20, 192), double_quant=nested)
    sizes = {"x": (5, 192), "h": (5, 3), "B": (20, 3), "A": (3, 192)}
    tensors = {name: torch.randn(size).half() for name, size in sizes.items()}
    assert loads_beside(partial(in_4_bits, w), **tensors, **w.tensors()) == 0


@triton.jit
def load_tile_of_a_padded_rank(p, o_row, o_column, stride, rows, columns):
    return right_load_tile(p, o_row, o_column, stride, tl.where(rows == 12, 16, rows), tl.where(columns == 12, 16, columns))


@triton.jit
def load_tile_of_dense_rows(p, o_row, o_column, stride, rows, columns):
    return right_load_tile(p, o_row, o_column, columns, rows, columns)


@pytest.mark.parametrize("module", [project, grad_dy, lowrank_product], ids=lambda module: module.__name__.split(".")[-1])
def test_a_rank_that_is_read_to_its_padding_is_seen(module, monkeypatch: pytest.MonkeyPatch) -> None:
    if module is lowrank_product:
        monkeypatch.setattr(linear.tuning, "dataflow", lambda a, W, direction: "lowrank_product")
        monkeypatch.setattr(tuning, "TMA_GPUS", ())
    monkeypatch.setattr(module, "load_tile", load_tile_of_a_padded_rank)
    assert wrong(CASE)[1] > 0


def test_row_strides_that_are_ignored_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.tuning, "dataflow", lambda a, W, direction: "lowrank_product")
    monkeypatch.setattr(tuning, "TMA_GPUS", ())
    monkeypatch.setattr(lowrank_product, "load_tile", load_tile_of_dense_rows)
    assert {"y", "dx"} <= wrong(CASE)[0]


@pytest.mark.parametrize("count", [2, 15, 16, 17, 33])
def test_every_part_is_in_the_sum(count: int) -> None:
    parts = torch.randn(count, 7, 45)
    (total,) = sums.sum_parts((parts, count, torch.float32))
    torch.testing.assert_close(total.double(), parts.double().sum(0), rtol=1e-5, atol=1e-5)


def test_sums_in_one_launch_are_each_of_their_own_parts() -> None:
    parts = [torch.randn(count, size) for count, size in ((2, 700), (5, 300), (3, 900))]
    for total, of in zip(sums.sum_parts(*[(p, len(p), torch.float32) for p in parts]), parts, strict=True):
        torch.testing.assert_close(total.double(), of.double().sum(0), rtol=1e-5, atol=1e-5)


def test_the_mask_of_a_wide_rank_goes_on_in_the_next_chunk_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(CASE, M=70, N=80, R=80)
    monkeypatch.setattr("lora_kernels.mask.chunk_elements", lambda device: 1 << 11)
    problem = case.draw()
    with use_backend("triton"):
        assert not broken_results(problem, contract(problem))
        monkeypatch.setattr(linear.WideMask, "chunk", lambda self, rows: setattr(self, "first_row", 0))
        assert {"h", "dx", "dA"} <= set(broken_results(problem, contract(problem)))
