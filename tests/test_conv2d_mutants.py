"""Mistakes in backends/torch/conv2d.py, which the rule must catch."""

import pytest
import torch
from conv2d_accuracy import broken

from lora_kernels.backends.torch import conv2d
from lora_kernels.cases.conv2d import Case


def replaced(name, make):
    """A function of the module becomes make(the original)."""
    return lambda patch: patch.setattr(conv2d, name, make(getattr(conv2d, name)))


def gradient_of(number):
    def wrong(original):
        def backward(*arguments):
            grads = original(*arguments)
            grads[number] = grads[number] * 1.01
            return grads

        return backward

    return replaced("backward", wrong)


def other_seed(original):
    def backward(dy, x, shape, member, h, dropout, *rest):
        return original(dy, x, shape, member, h, dropout._replace(seed=dropout.seed + 1), *rest)

    return backward


def without_the_last_line(original):
    def chunks(n, height, *rest, **options):
        return ((samples, slice(0, height - 1)) for samples, _ in original(n, height, *rest, **options))

    return chunks


MUTANTS = {
    **{f"gradient of {name}": gradient_of(i) for i, name in enumerate(("x", "W", "A", "B", "c"))},
    "no scaling forward": replaced("_add_up", lambda of: lambda y, h, B, s: of(y, h, B, 1.0)),
    "no scaling in g": replaced("_project", lambda of: lambda dy, B, s: of(dy, B, 1.0)),
    "no scaling in dB": replaced("_outer", lambda of: lambda dy, h, s: of(dy, h, 1.0)),
    "other dropout scale": replaced("keep_scale", lambda of: lambda p: of(p) * 1.01),
    "another seed in backward": replaced("backward", other_seed),
    "no dropout": replaced("_drop", lambda of: lambda v, dropout: v),
    "a line lost": replaced("_chunks", without_the_last_line),
    "pixels transposed": replaced("_pixels", lambda of: lambda t: t.permute(0, 3, 2, 1).reshape(-1, t.shape[1])),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, dtype, monkeypatch):
    cases = [Case(p=0.3, position=position, channels_last=position == "h", dtype=dtype) for position in ("x", "h")]
    assert not any(broken(case) for case in cases)
    MUTANTS[name](monkeypatch)
    assert any(broken(case) for case in cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_merged_weight_without_the_adapter_is_caught(dtype, monkeypatch):
    """Of a narrower weight none is made."""
    assert not broken(Case(dtype=dtype))
    monkeypatch.setattr(conv2d, "_merged", lambda W, A, B, s: W)
    assert [line.partition(":")[0] for line in broken(Case(dtype=dtype))] == ["dx", "dx"]
    assert not broken(Case(dtype=dtype, size=(3, 3)))
