"""The specification against what it shares nothing with: autograd, bitsandbytes' formula by hand, a mask by hand."""

import pytest
import torch
from segments_accuracy import FORMS

from lora_kernels import dropout_mask
from lora_kernels.cases.linear import Case
from lora_kernels.functional.nf4 import quantize
from lora_kernels.mask import keep_scale
from lora_kernels.reference import grouped_linear, linear, nf4
from lora_kernels.values import Dropout, LoRAWeights, Needs

FIELDS = ("weight", "lora_A", "lora_B", "bias")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 3])
def test_backward_is_the_derivative_of_forward(count, p):
    """Every gradient of several members over one x, each with a mask of its own."""
    problems = [Case(M=7, K=9, N=5 + i, R=2 + i, p=p, dtype=torch.float64, needs=tuple("xWABc")).draw() for i in range(count)]
    x, dropout = problems[0].x, Dropout(p, torch.tensor(5), offset=11) if p else None
    members = tuple(problem.member()._replace(scaling=0.5 + i) for i, problem in enumerate(problems))
    dys = tuple(problem.dy for problem in problems)
    ys, hs = linear.forward(x, members, dropout)
    leaves = [getattr(member, field) for member in members for field in FIELDS]
    want = torch.autograd.grad(ys, (x, *leaves), dys)
    with torch.no_grad():
        dx, grads = linear.backward(dys, x, members, hs, dropout, Needs(True, (FIELDS,) * count))
    found = [dx, *(grad[field] for grad in grads for field in FIELDS)]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_segments_backward_is_the_derivative_of_their_forward(form, p):
    case, own = FORMS[form]
    problem = case(M=12, K=9, N=5, p=p, sizes=(4, 0, 3, 2), dtype=torch.float64, needs=("x", *FIELDS), **own).draw()
    members, about = tuple(problem.members.values()), (problem.case.rows(), problem.case.dropouts())
    (y,), (h,) = grouped_linear.forward(problem.x, members, problem.dropout(), *about)
    names = [tuple(f for f in FIELDS if isinstance(getattr(m, f), torch.Tensor)) for m in members]
    leaves = [getattr(m, f) for m, fields in zip(members, names, strict=True) for f in fields]
    want = torch.autograd.grad(y, (problem.x, *leaves), problem.dys["y"], allow_unused=True)
    with torch.no_grad():
        about = problem.dropout(), Needs(True, tuple(names)), *about
        dx, grads = grouped_linear.backward((problem.dys["y"],), problem.x, members, (h,), *about)
    found = [dx, *(grad.get(f) for grad, fields in zip(grads, names, strict=True) for f in fields)]
    assert all(a is b is None or torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, want, strict=True))


def test_only_the_wanted_gradients_come_back():
    problem = Case(dtype=torch.float64).draw()
    x, member = problem.x.detach(), problem.member()
    _, hs = linear.forward(x, (member,), None)
    dx, (found,) = linear.backward((problem.dy,), x, (member,), hs, None, Needs(False, (("lora_B",),)))
    assert dx is None
    assert set(found) == {"lora_B"}


def test_forward_is_the_equation():
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c for the second of two members, element by element."""
    p, x = 0.4, torch.randn(3, 8, dtype=torch.float64)
    W, A, B, c = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 8), (2, 8), (5, 2), (5,)))
    dropout = Dropout(p, torch.tensor(3), offset=7)
    ys, hs = linear.forward(x, (LoRAWeights(W, A, B, c, 0.5), LoRAWeights(W, A, B, c, 0.5)), dropout)
    keep = dropout_mask(3, 8, p, 3, offset=8)
    for m in range(3):
        dropped = [x[m, k].item() * keep_scale(p) if keep[m, k] else 0.0 for k in range(8)]
        h = [sum(A[r, k].item() * dropped[k] for k in range(8)) for r in range(2)]
        assert torch.allclose(hs[1][m], torch.tensor(h, dtype=torch.float64))
        for n in range(5):
            base = sum(x[m, k].item() * W[n, k].item() for k in range(8)) + c[n].item()
            assert abs(ys[1][m, n].item() - base - 0.5 * sum(h[r] * B[n, r].item() for r in range(2))) < 1e-12


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 7), (40, 96), (1001,)])
def test_four_bit_values_are_what_every_backend_decodes(shape, quant_type, double_quant):
    w = quantize(torch.randn(shape), quant_type, 64, double_quant)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert torch.equal(nf4.dequantize(w, dtype), w.dequantize(dtype))
