"""The backend `cpu`: dtypes, layouts and threads of csrc/cpu's low-rank loops, what it leaves to PyTorch, and mistakes in it.

Its part in the matrix of options is in test_linear.py, test_linear_group.py and test_glu_mlp.py.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import Case, check, contract, nan_in_fresh_memory, ours, plain, truth, violations
from cpu_extension_build import SOURCES, compiled
from kinds import DTYPES
from properties import given, settings, st
from test_linear import FORMATS, RANDOM

from lora_kernels import LoRAWeights, backend_report, cpu_extension, dropout_mask, lora_linear, use_backend
from lora_kernels.backends.cpu import linear
from lora_kernels.operation import prepared
from lora_kernels.values import Dropout

BF16, FP16, FP32, FP64 = DTYPES
SIZES = [(1, 1, 1, 1), (1, 9, 4, 1), (3, 8, 70, 5), (17, 24, 33, 4), (15, 129, 36, 12), (129, 17, 19, 24), (8, 64, 64, 16)]
SIZES.append((2200, 9, 12, 3))  # whose rows are 23 chunks of 96, others' up to 3 of 64
PAIRS = list(itertools.product(DTYPES, DTYPES))


pytestmark = pytest.mark.usefixtures("cpu_by_name")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(size, dtype, p):
    M, K, N, R = size
    check(Case(M, K, N, R, p=p, dtype=dtype, scaling=0.5))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS)
def test_pairs_of_dtypes(dtype, adapter, p, strided):
    """Several blocks and chunks of rows, tiles of columns, and the least vector's rest; few rows, whose dx may be csrc's."""
    for size in ((131, 267, 141, 9), (9, 24, 33, 4)):
        check(Case(*size, p=p, dtype=dtype, adapter_dtype=adapter, strided=strided, needs=tuple("xABc")))


@pytest.mark.parametrize("name", ["A", "B"])
def test_the_gradient_of_a_wide_adapter_alone_is_as_exact_as_its_dtype(name):
    """dB reads h, and neither A nor B."""
    problem = Case(33, 70, 50, 6, p=0.2, adapter_dtype=FP64, needs=(name,)).draw()
    grad, exact = ours(problem)[f"d{name}"], truth(problem)[f"d{name}"]
    assert (grad - exact).norm() <= 1e-14 * exact.norm()


@pytest.mark.parametrize("R", [33, 64, 100, 256])
def test_ranks_that_it_takes_by_name_alone(R):
    check(Case(70, 150, 140, R, p=0.2, dtype=BF16))
    check(Case(70, 150, 140, R, p=0.2))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_for_any_number_of_threads(dtype, threads):
    """Of 2,400 rows, whose sums are over 25 chunks of 96 rows."""
    problem = Case(2400, 70, 33, 5, p=0.2, dtype=dtype, adapter_dtype=FP32).draw()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            found.append(contract(problem))
    finally:
        torch.set_num_threads(before)
    for name in ("h", "dA", "dB", "dc"):
        assert all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_from_any_row_of_the_mask_on(dtype):
    """As chunks of rows between an MLP's layers have it."""
    problem = Case(40, 70, 33, 5, p=0.4, dtype=dtype, needs=()).draw()
    members, dropout = (problem.member(),), problem.dropout()
    (whole,), (h,) = linear.forward(problem.x, members, dropout)
    (part,), (h_part,) = linear.forward(problem.x[13:], members, dropout, first=13)
    torch.testing.assert_close(part, whole[13:])
    torch.testing.assert_close(h_part, h[13:])


def test_the_mask_of_a_quarter_of_a_million_elements():
    """Of whose 16-bit lanes some are the threshold itself."""
    x, A, B, dropout = torch.ones(512, 512), torch.ones(1, 512), torch.ones(3, 1), Dropout(0.5, torch.tensor(3))
    _, (h,) = linear.forward(x, (LoRAWeights(torch.ones(3, 512), A, B, None, 1.0),), dropout)
    assert torch.equal(h[:, 0], 2.0 * dropout_mask(512, 512, 0.5, 3).sum(1))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradients_of_any_layout(dtype):
    x, W, A, B = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((5, 16), (12, 16), (3, 16), (12, 3)))
    y = lora_linear(x, W.detach(), A, B)
    for grad in (torch.ones((), dtype=dtype).expand(5, 12), torch.randn(12, 5, dtype=dtype).T):
        strided, plain_ = (torch.autograd.grad(y, (x, A, B), g, retain_graph=True) for g in (grad, grad.contiguous()))
        assert all(map(torch.equal, strided, plain_))


def test_adapters_of_any_layout():
    problem = Case(9, 24, 33, 4, p=0.2).draw()
    want = contract(problem)
    other = {"A": problem.A.detach().T.contiguous().T, "B": torch.cat([problem.B, problem.B], 1).detach()[:, 4:]}
    got = contract(replace(problem, **{name: t.requires_grad_() for name, t in other.items()}))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_base_weights_and_biases_of_any_layout(dtype):
    problem = Case(9, 24, 33, 4, p=0.2, dtype=dtype, needs=("x", "A", "B")).draw()
    turned, apart = problem.W.T.contiguous().T, torch.stack([problem.c, torch.ones_like(problem.c)], 1)[:, 0]
    want, got = contract(problem), contract(replace(problem, W=turned, c=apart))
    assert all((got[name] - want[name]).norm() <= 0.01 * want[name].norm() for name in want)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_a_fresh_adapter_is_the_base_layer_to_the_bit(dtype):
    problem = Case(70, 200, 150, 8, p=0.1, dtype=dtype, needs=()).draw()
    y = lora_linear(problem.x, problem.W, problem.A, torch.zeros_like(problem.B), problem.c, dropout_p=0.1)
    assert torch.equal(y, torch.nn.functional.linear(problem.x, problem.W, problem.c))


@pytest.mark.parametrize("K", [1, 7])
def test_sums_for_fewer_columns_than_a_vector_are_pytorch_s(K):
    """Which csrc/cpu would sum up term by term: of positive ones with ten times the error."""
    x, W, A = (torch.rand(shape) for shape in ((4, K), (283, K), (2, K)))
    dy, y = torch.rand(4, 283), lora_linear(x.requires_grad_(), W, A, torch.zeros(283, 2))
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy @ W)


class Wrapped(torch.Tensor):
    """Whose elements need not be where its address is."""


def test_a_gradient_of_a_class_of_its_own_is_pytorch_s(monkeypatch):
    x, W, A, B = (torch.randn(shape, requires_grad=True) for shape in ((5, 16), (12, 16), (3, 16), (12, 3)))
    y, dy = lora_linear(x, W.detach(), A, B), torch.randn(5, 12)
    want = torch.autograd.grad(y, (x, A, B), dy, retain_graph=True)
    monkeypatch.setattr(cpu_extension, "extension", None)
    for got, other in zip(torch.autograd.grad(y, (x, A, B), dy.as_subclass(Wrapped)), want, strict=True):
        torch.testing.assert_close(torch.Tensor(got), other)


# pytest tests/test_cpu_linear.py -k random --hypothesis-profile=thorough: 5,000 of them, in half an hour
SIZED = {"M": st.integers(0, 200), "K": st.integers(1, 300), "N": st.integers(1, 300), "R": st.integers(1, 70)}


@settings(deadline=None)
@given(st.builds(Case, **{**RANDOM, **FORMATS, **SIZED, "adapter_dtype": st.none() | st.sampled_from(DTYPES)}))
def test_random_options(case):
    check(case)


# ---- who computes ----


def reason(**tensors):
    return next(row for row in backend_report(**tensors) if row.backend == "cpu")


def test_reasons(monkeypatch):
    x, W = torch.ones(300, 64), torch.ones(64, 64)
    adapters = {R: {"lora_A": torch.ones(R, 64), "lora_B": torch.ones(64, R)} for R in (32, 64)}
    assert reason(x=x, weight=W, **adapters[64]).used
    with use_backend("auto"):
        assert reason(x=x, weight=W, **adapters[32]).used
        assert "faster at rank 64, from 33 on" in reason(x=x, weight=W, **adapters[64]).reason
        assert reason(x=x[:2], weight=W, **adapters[64]).used
    assert "a class of its own" in reason(x=x.as_subclass(Wrapped), weight=W).reason
    assert "a CPU's, this call is on meta" in reason(x=x.to("meta"), weight=W.to("meta")).reason
    monkeypatch.setattr(cpu_extension, "extension", None)
    monkeypatch.setattr(cpu_extension, "why_not", "csrc/cpu was not built")
    assert reason(x=x, weight=W).reason == "csrc/cpu was not built"
    with pytest.raises(RuntimeError, match="backend 'cpu' was requested but cannot compute this call: csrc/cpu was not built"):
        lora_linear(x, W, *adapters[32].values())


# ---- mistakes ----

MISTAKES = {
    "the second vector": ("(out + i * out_row + j * WIDTH<T, BYTES>, &", "(out + i * out_row, &"),
    "the last columns": ("for (; j < columns; ++j)", "for (; j + 1 < columns; ++j)"),
    "the last rows": ("for (; i < rows; ++i)\n    combine_block", "for (; i + 1 < rows; ++i)\n    combine_block"),
    "no scaling forward": ("l.N, l.R, l.N, s);", "l.N, l.R, l.N, T{1});"),
    "no scaling of g": ("l.R, padded, s);", "l.R, padded, T{1});"),
    "no scaling of dB": ("l.N, l.R, static_cast<T>(l.s)", "l.N, l.R, T{1}"),
    "base product in dx": ("W, to.W.stride, term.N);", "W, to.W.stride, term.N - 1);"),
    "no dropout of x": ("if (drops) drop(room.tile", "if (drops && term.K < 0) drop(room.tile"),
    "no dropout of dx": ("if (term.mask.threshold) drop(room.wide", "if (term.K < 0) drop(room.wide"),
    "dropout's scale": ("const T scale = term.scale;", "const T scale = term.scale > 0 ? 1 : 0;"),
    "the first rows' mask": (": term.first + p.first;", ": term.first;"),
    "the first columns' mask": ("(p.column / LANES);", "(p.column * 0);"),
    "a row of dc": ("sum[j] += dy.at[i * dy.row + j]", "sum[j] += dy.at[j]"),
    "a chunk of rows": ("std::int64_t part = 1; part < parts", "std::int64_t part = 2; part < parts"),
    "rows that lie apart": ("(in.at(p.first, p.column)), in.stride}", "(in.at(p.first, p.column)), in.stride / 8 * 8}"),
    "another type": (
        "Rows::BFLOAT16: return run(reinterpret_cast<BFloat16*>",
        "Rows::BFLOAT16: return run(reinterpret_cast<Half*>",
    ),
    "what was there is added to": ("    if (add)\n", "    if (add || p.columns > 0)\n"),
}
CASES = [
    Case(33, 40, 50, 6, p=0.2, scaling=0.5),
    Case(150, 200, 50, 6, p=0.2, scaling=0.5, strided=True),
    Case(150, 200, 50, 6, p=0.2, scaling=0.5, dtype=BF16),
]


def broken(case):
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    prepared._kinds.clear()
    with nan_in_fresh_memory():
        return violations(ours(problem), expected, exact, case.dtype)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, tmp_path, monkeypatch):
    old, new = MISTAKES[mistake]
    (file,) = [source.name for source in SOURCES.iterdir() if old in source.read_text()]
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path, (file, old, new)))
    assert any(map(broken, CASES))


def test_csrc_is_right(tmp_path, monkeypatch):
    """Compiled as those are."""
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path))
    assert not any(map(broken, CASES))
