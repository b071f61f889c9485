"""The backend `cpu` over segments: its threads, layouts and base products, and mistakes in it that the rule must catch.

Its part in the matrix of options is in test_grouped_linear.py.
"""

from dataclasses import replace

import pytest
import torch
from accuracy import nan_in_fresh_memory
from cpu_extension_build import SOURCES, compiled
from kinds import DTYPES, Kind
from segments_accuracy import FORMS, case_of, check, every_form

from lora_kernels import cpu_extension
from lora_kernels.backends.cpu import grouped_linear
from lora_kernels.cases.grouped_linear import GroupedCase
from lora_kernels.cases.members import ours, plain, truth
from lora_kernels.cases.rule import violations
from lora_kernels.operation import prepared

BF16, FP16, FP32, FP64 = DTYPES
DENSE = Kind("cpu", None)
ALL = ("x", "weight", "lora_A", "lora_B", "bias")


pytestmark = pytest.mark.usefixtures("cpu_by_name")


@every_form
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("sizes", [(150, 0, 90, 1), (0, 300, 0, 0)])
def test_the_same_bits_for_any_number_of_threads(form, dtype, sizes):
    """Which take a segment each, or where those are fewer all take the rows of one."""
    problem = case_of(form, DENSE, K=70, M=310, sizes=sizes, p=0.2, dtype=dtype, adapter_dtype=FP32, needs=ALL[2:4]).draw()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ours(problem))
    finally:
        torch.set_num_threads(before)
    for name in found[0]:
        assert name == "y" or all(torch.equal(found[0][name], other[name]) for other in found[1:]), name


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needs", [("x", "lora_A", "lora_B"), ("weight",)])
@pytest.mark.parametrize("N", [32, 33])
def test_a_stack_s_products_with_grouped_mm_and_without(p, needs, N, monkeypatch):
    """It takes rows of whole 16 bytes."""
    calls, original = [], torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **options: calls.append(0) or original(*a, **options))
    check(GroupedCase(N=N, p=p, needs=needs, bias=False))
    assert bool(calls) == (N == 32)


def test_stacks_of_any_layout():
    """B as PEFT's parameter wrappers have it, of ranks whose elements lie apart."""
    problem = GroupedCase(p=0.2, needs=("x", "lora_A", "lora_B")).draw()
    own = problem.members["experts"]
    turned = {name: getattr(own, name).detach().mT.contiguous().mT.requires_grad_() for name in ("lora_A", "lora_B")}
    want, got = ours(problem), ours(replace(problem, members={"experts": own._replace(**turned)}))
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_form
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_biases_of_any_layout(form, dtype):
    problem = case_of(form, DENSE, dtype=dtype, needs=("x",)).draw()
    name, base = next(iter(problem.members.items()))
    apart = torch.stack([base.bias, torch.ones_like(base.bias)], -1)[..., 0]
    want, got = ours(problem), ours(replace(problem, members={**problem.members, name: base._replace(bias=apart)}))
    assert torch.equal(got["y"], want["y"])


@every_form
def test_rows_of_any_layout(form):
    problem = case_of(form, DENSE, p=0.2, needs=("x", "lora_A", "lora_B")).draw()
    x, dy = (t.detach().T.contiguous().T for t in (problem.x, problem.dys["y"]))
    want, got = ours(problem), ours(replace(problem, x=x.requires_grad_(), dys={"y": dy}))
    assert all(torch.equal(got[name], want[name]) for name in want)


# ---- mistakes ----


def of_part(change):
    """A mistake in what csrc/cpu is told of a segment."""

    def mutate(monkeypatch, original=grouped_linear._parts):
        monkeypatch.setattr(grouped_linear, "_parts", lambda *a: [change(list(part), original(*a)) for part in original(*a)])

    return mutate


def with_field(place, value):
    return of_part(lambda part, parts: (*part[:place], value(part, parts), *part[place + 1 :]))


MISTAKES = {
    "A of the first": (("own", "shared", "adapters"), with_field(3, lambda part, parts: parts[0][3])),
    "B of the first": (("own", "shared", "adapters"), with_field(4, lambda part, parts: parts[0][4])),
    "s of the first": (("adapters",), with_field(5, lambda part, parts: parts[0][5])),
    "no scale of dropout": (("own", "shared", "adapters"), with_field(6, lambda part, parts: 1.0)),
    "threshold of the first": (("adapters",), with_field(7, lambda part, parts: parts[0][7])),
    "the last row left out": (("own", "shared", "adapters"), with_field(1, lambda part, parts: part[1] - 1)),
    "dB of the first": (("own", "shared"), with_field(10, lambda part, parts: parts[0][10])),
    "the order forgotten": (("adapters",), lambda patch: patch.setattr(grouped_linear, "_address", lambda order: 0)),
    "W of the first": (("own",), lambda patch: patch.setattr(grouped_linear, "weight_of", lambda W, e: W[0])),
}
SOURCES_MISTAKES = {
    "the mask from row 0": (("own", "shared"), ("term.first = segment.start", "term.first = 0")),
    "the mask by sorted rows": (("adapters",), ("? term.x.order[p.first + run]", "? p.first + run")),
    "x from row 0": (("own", "shared", "adapters"), ("term.x = x.from(segment.start)", "term.x = x")),
    "y from row 0": (("own", "shared", "adapters"), ("segment.c, y.from(segment.start)", "segment.c, y")),
    "h from row 0": (("own", "shared", "adapters"), ("dy.from(first), h.from(first)", "dy.from(first), h")),
    "the next rows of x": (("adapters",), ("OWN<T> && !in.order", "OWN<T>")),
    "the next rows of y": (("adapters",), ("OWN<T> && !out.order", "OWN<T>")),
    "rows of an order as one": (("adapters",), ("!m.order && m.stride", "m.stride")),
}


def broken(form):
    case, own = FORMS[form]
    adapters = {"ranks": (4, 4), "scalings": (2.0, 0.5)} if form == "adapters" else {}
    problem = case(K=128, N=128, M=40, sizes=(17, 15), p=0.4, **{**own, **adapters}).draw()
    expected, exact = plain(problem), truth(problem)
    prepared._kinds.clear()
    with nan_in_fresh_memory():
        return violations(ours(problem), expected, exact, FP32)


@pytest.mark.parametrize(("form", "name"), [(form, name) for name, (forms, _) in MISTAKES.items() for form in forms])
def test_a_mistake_is_caught(form, name, monkeypatch):
    assert not broken(form)
    MISTAKES[name][1](monkeypatch)
    assert broken(form)


@pytest.mark.parametrize("name", SOURCES_MISTAKES)
def test_a_mistake_in_csrc_is_caught(name, tmp_path, monkeypatch):
    forms, (old, new) = SOURCES_MISTAKES[name]
    (file,) = [source.name for source in SOURCES.iterdir() if old in source.read_text()]
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path, (file, old, new)))
    assert all(map(broken, forms))
