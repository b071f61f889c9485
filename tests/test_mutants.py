"""Wrong arithmetic that the tolerance rule must catch: a rule that accepts one of these tests nothing."""

import pytest
import torch
from accuracy import Case, ours, pytorch, truth, violations

from lora_kernels import mask as dropout
from lora_kernels import operation as ops
from lora_kernels.backends.torch import linear as reference
from lora_kernels.functional import linear as functional


def scaled(index, factor):
    def mutate(monkeypatch):
        original = reference.lora_backward

        def backward(*args):
            grads = list(original(*args))
            grads[index] = grads[index] * factor
            return tuple(grads)

        monkeypatch.setattr(reference, "lora_backward", backward)

    return mutate


def wrong_h(monkeypatch):
    original = reference.lora_forward

    def forward(*args):
        y, h = original(*args)
        return y, h * 1.01

    monkeypatch.setattr(reference, "lora_forward", forward)


def without_bias(monkeypatch):
    original = reference.lora_forward
    monkeypatch.setattr(reference, "lora_forward", lambda x, W, A, B, s, c, p, seed: original(x, W, A, B, s, None, p, seed))


def flipped_mask_bit(monkeypatch):
    original = dropout.KeepRows.__call__

    def call(self, rows):
        keep = original(self, rows)
        keep[0, 0] = 1 - keep[0, 0]
        return keep

    monkeypatch.setattr(reference.KeepRows, "__call__", call)


def other_mask_in_backward(monkeypatch):
    original = ops.lora_backward

    def backward(*args):
        args = list(args)
        args[8] = args[8] + 1
        return original(*args)

    monkeypatch.setattr(functional.ops, "lora_backward", backward)


def p_instead_of_rounded_p(monkeypatch):
    monkeypatch.setattr(reference, "keep_scale", lambda p: 1 / (1 - p) * 1.01)


def forgotten_scaling(monkeypatch):
    original = reference.lora_backward
    monkeypatch.setattr(reference, "lora_backward", lambda *args: original(*args[:6], 1.0, *args[7:]))


MUTANTS = {
    "dx of 0.99": scaled(0, 0.99),
    "dA of 0.99": scaled(1, 0.99),
    "dB of 0.99": scaled(2, 0.99),
    "dc of 0.99": scaled(3, 0.99),
    "h saved wrong": wrong_h,
    "no bias": without_bias,
    "a mask bit": flipped_mask_bit,
    "another mask in backward": other_mask_in_backward,
    "another dropout scale": p_instead_of_rounded_p,
    "no scaling in backward": forgotten_scaling,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, dtype, monkeypatch):
    case = Case(M=33, K=40, N=50, R=6, p=0.2, scaling=0.5, dtype=dtype)
    tensors = case.tensors()
    plain, exact = pytorch(case, tensors), truth(case, tensors)
    assert not violations(ours(case, tensors), plain, exact, dtype)
    MUTANTS[name](monkeypatch)
    assert violations(ours(case, tensors), plain, exact, dtype)
