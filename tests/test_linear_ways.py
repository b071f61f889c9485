"""The three ways of PyTorch's backend through a layer of float32 or float64: in chunks, whole, and native, in csrc/cpu.

By size alone a small case would always go the last one.
"""

from collections.abc import Iterator

import pytest
import torch
from accuracy import Case, check, ours, plain, truth, violations
from cpu_extension_build import compiled

from lora_kernels import cpu_extension, lora_linear, use_backend
from lora_kernels.backends.torch import linear, native, whole
from lora_kernels.operation import prepared
from lora_kernels.values import Dropout

WIDE = [torch.float32, torch.float64]
SIZES = [(1, 1, 1, 1), (1, 9, 4, 1), (3, 8, 70, 5), (17, 24, 33, 4), (15, 129, 36, 12), (129, 17, 19, 24), (8, 64, 64, 16)]


@pytest.fixture(params=["chunks", "whole", "native"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The way that every call takes; the test fails where one took another."""
    if request.param == "native" and cpu_extension.extension is None:
        pytest.skip(cpu_extension.why_not)
    taken = []
    for name, module in (("chunks", linear), ("whole", whole), ("native", native)):
        for function in ("forward", "backward"):
            monkeypatch.setattr(module, function, _noted(taken, name, getattr(module, function)))
    monkeypatch.setattr(whole, "fits", (lambda call: False) if request.param == "chunks" else whole.fits)
    monkeypatch.setattr(native, "fits", (lambda call: True) if request.param == "native" else (lambda call: False))
    with use_backend("torch"):
        yield request.param
    assert taken
    assert set(taken) == {request.param}


def _noted(taken, name, function):
    def run(*args):
        taken.append(name)
        return function(*args)

    return run


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(way, size, dtype, p):
    M, K, N, R = size
    check(Case(M, K, N, R, p=p, dtype=dtype, scaling=0.5))


@pytest.mark.parametrize("needs", ["", "x", "A", "B", "c", "xA", "xB", "AB", "xAB", "ABc", "xABc"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_wanted_gradients(way, needs, p):
    check(Case(9, 40, 21, 3, p=p, needs=tuple(needs)))


OPTIONS = (
    *({"bias": False}, {"M": (2, 3)}, {"scaling": 1.0}, {"scaling": -3.0}, {"scaling": torch.tensor(0.5)}, {"p": 1.0}),
    *({"needs": tuple("xWABc")}, {"M": 40, "K": 600, "N": 500}),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(way, options):
    check(Case(**{"K": 40, "p": 0.2, **options}))


@pytest.mark.parametrize("way", ["chunks", "whole"], indirect=True)
def test_rows_that_lie_apart(way):
    check(Case(K=40, p=0.2, strided=True))


@pytest.mark.parametrize("dtype", WIDE)
def test_a_weight_in_4_bits(way, dtype):
    check(Case(9, 64, 33, 4, p=0.3, dtype=dtype, quant_type="nf4", needs=("x", "A", "B", "c")))


def test_what_native_leaves_to_whole():
    """A gradient whose rows lie apart."""
    x, W, A, B = (torch.randn(shape, requires_grad=True) for shape in ((5, 16), (12, 16), (3, 16), (12, 3)))
    y = lora_linear(x, W.detach(), A, B)
    for grad in (torch.ones(()).expand(5, 12), torch.randn(12, 5).T):
        strided, plain_ = (torch.autograd.grad(y, (x, A, B), g, retain_graph=True) for g in (grad, grad.contiguous()))
        for got, want in zip(strided, plain_, strict=True):
            torch.testing.assert_close(got, want)


# ---- mistakes ----


def other_scale(monkeypatch):
    monkeypatch.setattr(whole, "drop", lambda v, *args, original=whole.drop, **out: original(v, *args, **out).mul_(1.01))


def other_mask(monkeypatch):
    def drop(v, p, seed, offset, original=whole.drop, **out):
        return original(v, p, seed + (v.shape[1] == 40), offset, **out)

    monkeypatch.setattr(whole, "drop", drop)


def no_scaling(monkeypatch):
    monkeypatch.setattr(whole, "product", lambda a, b, s, original=whole.product: original(a, b))


def unscaled_gradient_of_b(monkeypatch):
    monkeypatch.setattr(whole, "transposed_product", lambda a, b, s, original=whole.transposed_product: original(a, b))


def another_member_s_offset(monkeypatch):
    backward = whole.backward
    changed = lambda dys, x, members, hs, dropout, needs: backward(dys, x, members, hs, Dropout(*dropout[:2], 1), needs)  # noqa: E731
    monkeypatch.setattr(whole, "backward", changed)


def broken(needs: tuple[str, ...], M: int = 33, K: int = 40) -> list[str]:
    case = Case(M=M, K=K, N=50, R=6, p=0.2, scaling=0.5, needs=needs)
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    prepared._kinds.clear()
    with use_backend("torch"):
        return violations(ours(problem), expected, exact, case.dtype)


@pytest.mark.parametrize("mistake", [other_scale, other_mask, no_scaling, unscaled_gradient_of_b, another_member_s_offset])
def test_a_mistake_in_whole_is_seen(mistake, monkeypatch):
    monkeypatch.setattr(native, "fits", lambda call: False)
    assert not broken(tuple("xWABc"))
    mistake(monkeypatch)
    assert broken(tuple("xWABc"))


MISTAKES = {
    "the second vector": ("products.h", "out + i * out_row + j * WIDTH<T>, VECTOR", "out + i * out_row, VECTOR"),
    "the last columns": ("products.h", "for (; j < columns; ++j)", "for (; j + 1 < columns; ++j)"),
    "the last rows": ("products.h", "for (; i < rows; ++i)\n    combine_block", "for (; i + 1 < rows; ++i)\n    combine_block"),
    "no scaling forward": ("low_rank.cpp", "t(l.B), l.N, l.R, s);", "t(l.B), l.N, l.R, T{1});"),
    "no scaling of g": ("low_rank.cpp", "= s * t(l.B)", "= t(l.B)"),
    "no scaling of dB": ("low_rank.cpp", "l.R, l.N, static_cast<T>(l.s)", "l.R, l.N, T{1}"),
    "base product in dx": ("low_rank.cpp", "to.W + k, K, N);", "to.W + k, K, N - 1);"),
    "no dropout forward": ("low_rank.cpp", "Factor<T>{v.at, v.row", "Factor<T>{v.at ? term.x + first * K + k : v.at, K"),
    "no dropout of dA": ("low_rank.cpp", "v.at, v.row, rows)", "v.at ? term.x + first * K + k : v.at, K, rows)"),
    "no dropout of dx": ("low_rank.cpp", "+= v.at[i * COLUMNS + j]", "+= (v.at ? room.wide : v.at)[i * COLUMNS + j]"),
    "dropout's scale": ("low_rank.cpp", "const T scale = term.scale;", "const T scale = term.scale > 0 ? 1 : 0;"),
    "the first rows' mask": ("low_rank.cpp", "static_cast<std::uint32_t>(first), rows", "static_cast<std::uint32_t>(0), rows"),
    "the first columns' mask": ("low_rank.cpp", "static_cast<std::uint32_t>(k / LANES)", "static_cast<std::uint32_t>(0)"),
    "a row of dc": ("low_rank.cpp", "to.dc[j] += dy[i * N + j]", "to.dc[j] += dy[j]"),
    "a chunk of rows": ("low_rank.cpp", "std::int64_t part = 1; part < parts", "std::int64_t part = 2; part < parts"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_csrc_is_seen(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path, MISTAKES[mistake]))
    assert broken(tuple("xABc")) or broken(tuple("xABc"), M=150, K=200)


def test_csrc_is_right(tmp_path, monkeypatch):
    """Compiled as those are."""
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path))
    assert not broken(tuple("xABc"))
    assert not broken(tuple("xABc"), M=150, K=200)
