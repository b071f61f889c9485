"""The two ways of PyTorch's backend through a layer of float32 or float64: in chunks, and whole, which a small case goes."""

from collections.abc import Iterator

import pytest
import torch
from accuracy import Case, check, ours, plain, truth, violations

from lora_kernels import use_backend
from lora_kernels.backends.torch import linear, whole
from lora_kernels.operation import prepared
from lora_kernels.scratch import slices
from lora_kernels.values import Dropout

WIDE = [torch.float32, torch.float64]
SIZES = [(1, 1, 1, 1), (1, 9, 4, 1), (3, 8, 70, 5), (17, 24, 33, 4), (15, 129, 36, 12), (129, 17, 19, 24), (8, 64, 64, 16)]


@pytest.fixture(params=["chunks", "whole"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The way that every call takes, in chunks of 16 rows; the test fails where one took another."""
    taken = []
    for name, module in (("chunks", linear), ("whole", whole)):
        for function in ("forward", "backward"):
            monkeypatch.setattr(module, function, _noted(taken, name, getattr(module, function)))
    if request.param == "chunks":
        monkeypatch.setattr(whole, "fits", lambda call: False)
        monkeypatch.setattr(linear, "row_chunks", lambda M, width, device: slices(M, 16))
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


def test_rows_that_lie_apart(way):
    check(Case(K=40, p=0.2, strided=True))


@pytest.mark.parametrize("dtype", WIDE)
def test_a_weight_in_4_bits(way, dtype):
    check(Case(9, 64, 33, 4, p=0.3, dtype=dtype, quant_type="nf4", needs=("x", "A", "B", "c")))


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


def broken(needs: tuple[str, ...]) -> list[str]:
    case = Case(M=33, K=40, N=50, R=6, p=0.2, scaling=0.5, needs=needs)
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    prepared._kinds.clear()
    with use_backend("torch"):
        return violations(ours(problem), expected, exact, case.dtype)


@pytest.mark.parametrize("mistake", [other_scale, other_mask, no_scaling, unscaled_gradient_of_b, another_member_s_offset])
def test_a_mistake_in_whole_is_seen(mistake, monkeypatch):
    assert not broken(tuple("xWABc"))
    mistake(monkeypatch)
    assert broken(tuple("xWABc"))
