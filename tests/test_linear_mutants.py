"""Wrong arithmetic that the tolerance rule must catch, in PyTorch's backend: a rule that accepts one of these tests nothing."""

import pytest
import torch
from accuracy import Case, ours, plain, truth, violations

from lora_kernels import mask, use_backend
from lora_kernels.backends.torch import engine, linear, whole
from lora_kernels.operation import prepared
from lora_kernels.values import Dropout


def plan_with(monkeypatch, forward=None, backward=None):
    """Every plan's functions, changed: forward(original, *args), backward(original, *args)."""
    choose = prepared.choose

    def changed(call):
        plan = choose(call)
        if forward is not None:
            plan = plan._replace(forward=lambda *args, original=plan.forward: forward(original, *args))
        if backward is not None:
            plan = plan._replace(backward=lambda *args, original=plan.backward: backward(original, *args))
        return plan

    monkeypatch.setattr(prepared, "choose", changed)
    monkeypatch.setattr(prepared, "_kinds", {})


def gradient_of(field):
    """The gradient of one tensor, by its field's name, is 1 % small."""

    def mutate(monkeypatch):
        def backward(original, *args):
            dx, (found,) = original(*args)
            if field == "x":
                return linear.Grads(dx * 0.99, (found,))
            return linear.Grads(dx, ({**found, field: found[field] * 0.99},))

        plan_with(monkeypatch, backward=backward)

    return mutate


def result(name):
    """y, or the h that is saved, is 1 % large."""

    def mutate(monkeypatch):
        def forward(original, *args):
            (y,), (h,) = original(*args)
            return ((y * 1.01,), (h,)) if name == "y" else ((y,), (h * 1.01,))

        plan_with(monkeypatch, forward=forward)

    return mutate


def member_without(field, value):
    """A field is read as another value, forward or backward."""

    def forward_of(monkeypatch):
        def forward(original, x, members, dropout):
            return original(x, (members[0]._replace(**{field: value}),), dropout)

        plan_with(monkeypatch, forward=forward)

    def backward_of(monkeypatch):
        def backward(original, dys, x, members, *rest):
            return original(dys, x, (members[0]._replace(**{field: value}),), *rest)

        plan_with(monkeypatch, backward=backward)

    return forward_of, backward_of


def other_mask_in_backward(monkeypatch):
    def backward(original, dys, x, members, hs, dropout, needs):
        return original(dys, x, members, hs, Dropout(dropout.p, dropout.seed + 1), needs)

    plan_with(monkeypatch, backward=backward)


def next_offset_in_backward(monkeypatch):
    def backward(original, dys, x, members, hs, dropout, needs):
        return original(dys, x, members, hs, dropout._replace(offset=1), needs)

    plan_with(monkeypatch, backward=backward)


def flipped_mask_bit(monkeypatch):
    original = mask.KeepRows.__call__

    def call(self, rows):
        keep = original(self, rows)
        keep[0, 0] = 1 - keep[0, 0]
        return keep

    monkeypatch.setattr(engine.KeepRows, "__call__", call)


def other_dropout_scale(monkeypatch):
    monkeypatch.setattr(linear, "keep_scale", lambda p: 1 / (1 - p) * 1.01)


MUTANTS = {
    **{f"gradient of {field}": gradient_of(field) for field in ("x", "weight", "lora_A", "lora_B", "bias")},
    "y": result("y"),
    "h saved wrong": result("h"),
    "no bias": member_without("bias", None)[0],
    "no scaling forward": member_without("scaling", 1.0)[0],
    "no scaling in backward": member_without("scaling", 1.0)[1],
    "a mask bit": flipped_mask_bit,
    "another seed in backward": other_mask_in_backward,
    "another offset in backward": next_offset_in_backward,
    "another dropout scale": other_dropout_scale,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, dtype, monkeypatch):
    case = Case(M=33, K=40, N=50, R=6, p=0.2, scaling=0.5, dtype=dtype, needs=tuple("xWABc"))
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    monkeypatch.setattr(whole, "fits", lambda call: False)  # whose own mutants are in test_linear_ways.py
    with use_backend("torch"):
        assert not violations(ours(problem), expected, exact, dtype)
        MUTANTS[name](monkeypatch)
        assert violations(ours(problem), expected, exact, dtype)
