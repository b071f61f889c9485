"""Many small segments as one grouped product: the one rule, the loop's results, and mistakes that the rule must catch."""

import pytest
import torch
from segments_accuracy import SIZES, check

from lora_kernels import use_backend
from lora_kernels.backends.torch import grouped_whole
from lora_kernels.cases.grouped_linear import GroupedCase
from lora_kernels.cases.members import ours, plain, truth
from lora_kernels.cases.rule import violations

pytestmark = pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch before 2.10")
FITS = {"K": 24, "N": 40, "R": 8, "bias": False}


@pytest.fixture
def calls(monkeypatch):
    """The passes that were computed whole."""
    found = []
    for name in ("forward", "backward"):
        original = getattr(grouped_whole, name)

        def counted(*arguments, name=name, original=original):
            found.append(name)
            return original(*arguments)

        monkeypatch.setattr(grouped_whole, name, counted)
    with use_backend("torch"):
        yield found


def case(M=17, sizes=(5, 0, 9, 2), **options):
    return GroupedCase(M=M, sizes=sizes, **{**FITS, **options})


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("size", SIZES)
def test_the_rule(calls, size, p):
    M, sizes = SIZES[size]
    check(case(M, sizes, p=p))
    assert calls == ["forward", "backward"] * (M > 0)


@pytest.mark.parametrize("needs", [("x",), ("lora_A", "lora_B"), ("lora_B",), ("lora_A",), ("x", "lora_B")])
def test_of_gradients_that_are_wanted(calls, needs):
    check(case(needs=needs, p=0.3))
    assert calls[0] == "forward"
    assert ("backward" in calls) == ("x" in needs), "W, without which it is the loop's, is kept for x's alone"


@pytest.mark.parametrize(
    "options",
    [
        *({"N": 33}, {"K": 26}, {"R": 3}, {"bias": True}, {"own": ()}, {"strided": True}),
        *({"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"M": 4 * grouped_whole.FEW + 1}),
    ],
    ids=str,
)
def test_what_is_the_loop_s(calls, options):
    check(case(**options))
    assert not calls


MUTANTS = {
    "the scale of dropout left out": ("keep_scale", lambda f: lambda p: 1.0),
    "no mask": ("_mask", lambda f: lambda M, K, dropout: None),
    "the mask of other rows": ("_mask", lambda f: lambda M, K, dropout: f(M, K, dropout._replace(offset=1))),
    "rows of none left as they are": ("_without_rest", lambda f: lambda v, rows: v.add_(0.1)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_breaks_the_rule(monkeypatch, name):
    attribute, mutate = MUTANTS[name]
    monkeypatch.setattr(grouped_whole, attribute, mutate(getattr(grouped_whole, attribute)))
    problem = case(p=0.3).draw(torch.Generator().manual_seed(0))
    with use_backend("torch"):
        assert violations(ours(problem), plain(problem), truth(problem), torch.float32)


@pytest.mark.parametrize("mistaken", [{"scaling": 1.0}, {"lora_A": "roll"}, {"lora_B": "roll"}, {"weight": "roll"}])
def test_a_mistaken_member_breaks_the_rule(monkeypatch, mistaken):
    ((field, value),) = mistaken.items()
    for name in ("forward", "backward"):
        original, place = getattr(grouped_whole, name), {"forward": 1, "backward": 2}[name]

        def changed(*arguments, original=original, place=place):
            own = arguments[place]
            new = getattr(own, field).roll(1, 0) if value == "roll" else value
            return original(*arguments[:place], own._replace(**{field: new}), *arguments[place + 1 :])

        monkeypatch.setattr(grouped_whole, name, changed)
    problem = case().draw(torch.Generator().manual_seed(0))
    with use_backend("torch"):
        assert len(violations(ours(problem), plain(problem), truth(problem), torch.float32)) >= 3


def test_as_the_loop(monkeypatch):
    problem = case(p=0.3).draw(torch.Generator().manual_seed(0))
    with use_backend("torch"):
        whole = ours(problem)
        monkeypatch.setattr(grouped_whole, "FEW", 0)
        loop = ours(problem)
    for name, value in loop.items():
        torch.testing.assert_close(whole[name], value)
