"""What the tests of AdaLoRA's and DoRA's layers share: the equation of a layer in training, under the one rule."""

import torch
from accuracy import violations
from peft_case import FixedMask
from torch import nn

from lora_kernels.mask import draw_seed


def results(letters, compute, x, parameters, dy):
    """y, and the gradients of x and of the parameters, whose letters are given."""
    y = compute(x)
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    return dict(zip(("y", "dx", *(f"d{letter}" for letter in letters)), (y.detach(), *grads), strict=True))


def check_equation(made, parameters, letters, equation, p):
    """Assert the one rule for a 24→33 layer in training; the truth: equation(x, W, c, *parameters, drop) in float64."""
    dtype = made.weight.dtype
    x, dy = torch.randn(3, 7, 24).to(dtype).requires_grad_(), torch.randn(3, 7, 33).to(dtype)
    torch.manual_seed(11)
    drop = FixedMask(p, draw_seed(x.device)) if p else nn.Identity()
    torch.manual_seed(11)
    found, own = results(letters, made, x, parameters, dy), [made.weight, made.bias, *parameters]

    def run(cast):
        leaves = [cast(t.detach()).requires_grad_() for t in (x, *own)]
        x_, W, c, *cast_parameters = leaves
        return results(letters, lambda x: equation(x, W, c, *cast_parameters, drop), x_, cast_parameters, cast(dy))

    plain, exact = run(lambda t: t), run(torch.Tensor.double)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in plain.items()}
    assert not (broken := violations(found, plain, exact, dtype)), broken
