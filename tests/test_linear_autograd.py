"""lora_linear under autograd, on both general backends: seeds, what is saved, which gradients are computed, errors."""

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import Case, check_checkpoint, gradients_asked, ours
from kinds import every_dense_kind

from lora_kernels import dropout_mask, lora_linear
from lora_kernels.cases.linear import LETTERS
from lora_kernels.values import Needs

pytestmark = every_dense_kind


# ---- seeds and masks ----


def inputs(device):
    return list(Case(device=device, needs=()).draw().inputs.values())[:4]


def test_the_generator_decides_the_mask(kind, device):
    tensors, outputs = inputs(device), []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append([lora_linear(*tensors, dropout_p=0.4) for _ in range(2)])
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])


def test_no_dropout_draws_nothing(kind, device):
    x, W, A, B = inputs(device)
    state = torch.get_rng_state()
    lora_linear(x, W, A, B)
    lora_linear(x, W, A, B, dropout_p=0.0, seed=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_as_tensor_and_int(kind, device):
    x, W, A, B = inputs(device)
    as_int = lora_linear(x, W, A, B, dropout_p=0.4, seed=-9)
    assert torch.equal(as_int, lora_linear(x, W, A, B, dropout_p=0.4, seed=torch.tensor(-9, device=device)))
    assert torch.equal(as_int, lora_linear(x, W, A, B, dropout_p=0.4, seed=torch.tensor([-9], device=device)))
    keep = dropout_mask(17, 24, 0.4, -9, device=device)
    alone = lora_linear(torch.ones_like(x), torch.zeros_like(W), torch.ones_like(A), torch.ones_like(B), dropout_p=0.4, seed=-9)
    assert torch.allclose(alone[:, 0], keep.sum(1) * 4 / (1 - round(0.4 * 65536) / 65536))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(kind, use_reentrant, device):
    check_checkpoint(Case(p=0.4, device=device).draw(), use_reentrant)


# ---- what is saved ----


def saved(problem):
    """The tensors that autograd saves, without x and the parameters, and whether x is among them."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        lora_linear(*problem.inputs.values(), dropout_p=problem.p)
    inputs = {t.untyped_storage().data_ptr() for t in problem.inputs.values()}
    x = problem.x.untyped_storage().data_ptr()
    extra = [t for t in packed if t.untyped_storage().data_ptr() not in inputs]
    return sum(t.untyped_storage().nbytes() for t in extra), any(t.untyped_storage().data_ptr() == x for t in packed)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("strided", [False, True])
def test_saved_bytes(kind, p, strided, device):
    M, R = (4, 32), 8
    case = Case(M=M, K=128, N=96, R=R, p=p, dtype=torch.bfloat16, device=device, strided=strided)
    assert saved(case.draw()) == (2 * 128 * R + (8 if p else 0), True)


def test_saved_bytes_of_a_transposed_x(kind, device):
    problem = Case(M=(6, 10), K=128, N=96, R=8, p=0.1, device=device, needs=("A", "B")).draw()
    transposed = replace(problem, x=problem.x.transpose(0, 1))  # cannot be viewed as [M, K]
    assert saved(transposed) == (4 * 60 * 8 + 8, True)


@pytest.mark.parametrize(
    ("needs", "extra", "x_saved"),
    [
        (("x", "B", "c"), 4 * 17 * 4 + 8, False),  # LoRA-FA: frozen A
        (("x", "A"), 8, True),  # frozen B: no h
        (("A", "B"), 4 * 17 * 4 + 8, True),
        (("c",), 0, False),
        (("x",), 8, False),
        ((), 0, False),
    ],
)
def test_only_what_a_wanted_gradient_reads_is_saved(kind, needs, extra, x_saved, device):
    case = Case(p=0.1, needs=needs, device=device)
    assert saved(case.draw()) == (extra, x_saved)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes_with_float32_adapters(kind, p, device):
    """h has the adapters' dtype; x is not copied."""
    case = Case(M=64, K=128, N=96, R=8, p=p, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    assert saved(case.draw()) == (4 * 64 * 8 + (8 if p else 0), True)


def test_saved_bytes_under_autocast(kind, device):
    case = Case(M=64, K=128, N=96, R=8, p=0.1, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert saved(case.draw()) == (4 * 64 * 8 + 8, True)


@pytest.mark.parametrize("needs", [n for k in range(6) for n in itertools.combinations("xWABc", k)])
def test_only_wanted_gradients_are_computed(kind, needs, monkeypatch):
    asked = gradients_asked(monkeypatch)
    ours(Case(needs=needs).draw())
    fields = tuple(LETTERS[name] for name in needs if name != "x")
    assert asked == ([Needs("x" in needs, (fields,))] if needs else [])


def test_output_may_be_modified_in_place(kind, device):
    """Nothing that was saved is a view of y, and no input is."""
    problem = Case(p=0.2, device=device, seed=1, scaling=1.0).draw()
    y = lora_linear(*problem.inputs.values(), dropout_p=0.2, seed=1)
    y.mul_(2).add_(1)
    y.backward(problem.dy)
    assert torch.allclose(problem.A.grad, 2 * ours(problem)["dA"])


def test_gradients_are_views_of_nothing(kind, device):
    problem = Case(device=device).draw()
    storages = [t.untyped_storage().data_ptr() for t in (*ours(problem).values(), *problem.inputs.values(), problem.dy)]
    assert len(set(storages)) == len(storages)


def test_expanded_gradient(kind, device):
    """sum().backward() hands over a gradient of stride zero."""
    x, W, A, B, _ = Case(device=device).draw().inputs.values()
    lora_linear(x, W, A, B).sum().backward()
    assert torch.allclose(x.grad, (W + B @ A).sum(0).expand_as(x), atol=1e-5)


def test_second_derivative_is_an_error(kind, device):
    problem = Case(device=device).draw()
    y = lora_linear(*problem.inputs.values())
    (dx,) = torch.autograd.grad(y.square().sum(), problem.x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="lora_linear: the second derivative is not implemented"):
        dx.sum().backward()


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": "x"}, TypeError, "x: got str, expected a torch.Tensor"),
        ({"x": torch.ones(3, 5)}, ValueError, r"x: got shape \(3, 5\), expected \[\.\.\., 4\]"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64"),
        (
            {"x": torch.ones(3, 4).double()},
            TypeError,
            r"x: got dtype torch.float64, expected torch.float32 as weight; use x.to",
        ),
        ({"weight": torch.ones(4)}, ValueError, r"weight: got shape \(4,\), expected two dimensions \[N, K\]"),
        ({"lora_A": torch.ones(4, 2)}, ValueError, r"lora_A: got shape \(4, 2\), expected \(4, 4\)"),
        ({"lora_A": torch.ones(0, 4)}, ValueError, "lora_A: got rank 0"),
        ({"lora_B": torch.ones(2, 6)}, ValueError, r"lora_B: got shape \(2, 6\), expected \(6, 2\).*use lora_B.T"),
        ({"lora_B": torch.ones(6, 2).half()}, TypeError, "lora_B: got dtype torch.float16, expected torch.float32 as lora_A"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: got shape \(5,\), expected \(6,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: got dtype torch.float16"),
        ({"weight": torch.ones(6, 4, device="meta")}, ValueError, "weight: got a tensor on meta, expected cpu as x"),
        ({"scaling": "2"}, TypeError, "scaling: got str"),
        ({"scaling": torch.ones(1)}, ValueError, "scaling: got a torch.float32 tensor of shape"),
        ({"scaling": torch.tensor(1.0, requires_grad=True)}, ValueError, "scaling: requires_grad is set"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p: got Tensor"),
        ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed: got float"),
    ],
)
def test_errors(kind, changes, error, words):
    arguments = {
        "x": torch.ones(3, 4),
        "weight": torch.ones(6, 4),
        "lora_A": torch.ones(2, 4),
        "lora_B": torch.ones(6, 2),
        **changes,
    }
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        lora_linear(**arguments)
    assert torch.equal(torch.get_rng_state(), state), "a refused call drew a seed"
