"""lora_glu_mlp under autograd: what it saves, which gradients it computes, checkpoints, its registered operators."""

import pytest
import torch
from accuracy import gradients_asked
from members_accuracy import every_kind, saved_bytes
from test_glu_mlp import every_form
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_glu_mlp
from lora_kernels.cases.glu_mlp import Case, Layer
from lora_kernels.cases.members import ours
from lora_kernels.functional.glu_mlp import kept
from lora_kernels.reference import glu_mlp as reference
from lora_kernels.values import Needs, flatten

BF16 = torch.bfloat16
FIELDS = ("weight", "lora_A", "lora_B", "bias")


def sized(kind, **options):
    """M = 128, I = 96; ranks 4, 3 and 5."""
    layers = [Layer(0, R, quant_type=kind.quant_type) for R in (4, 3, 5)]
    return Case(M=(4, 32), K=64, I=96, N=48, **dict(zip(("gate", "up", "down"), layers, strict=True)), **options)


@every_kind
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes(kind, p, device):
    """x, gate's and up's outputs, h of each, one seed; not act(gate), not a, no dropped copy."""
    expected = 2 * 128 * (2 * 96 + 4 + 3 + 5) + (8 if p else 0)
    assert saved_bytes(sized(kind, p=p, dtype=BF16, device=device).draw()) == (expected, True)


@every_kind
@pytest.mark.parametrize(
    ("needs", "frozen", "elements", "x_saved"),
    [
        (("x",), (), 2 * 96, False),
        (("lora_A",), (), 2 * 96, True),
        (("lora_B",), (), 2 * 96 + 4 + 3 + 5, False),
        (("lora_B",), ("gate", "up"), 5, False),  # down's dB reads dy and h alone
        (("lora_A",), ("gate", "up"), 2 * 96, False),  # down's dA reads a, which is made of e and u
        (("lora_B",), ("gate", "down"), 2 * 96 + 3, False),
        (("bias",), ("gate", "up"), 0, False),
        ((), (), 0, False),
    ],
)
def test_only_what_a_wanted_gradient_reads_is_saved(kind, needs, frozen, elements, x_saved, device):
    seed = 8 if "lora_A" in needs or elements > 5 else 0
    problem = sized(kind, p=0.1, needs=needs, frozen=frozen, device=device).draw()
    assert saved_bytes(problem) == (4 * 128 * elements + seed, x_saved)


def test_it_saves_less_than_the_frozen_layers():
    """Of which PyTorch keeps act(gate) and its product with up as well."""
    problem = Case(M=256, K=64, I=192, N=64, p=0.1, needs=("x", "lora_A", "lora_B")).draw()
    packed = {}

    def pack(t):
        packed[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    gate, up, down = (member.weight for member in problem.members.values())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        a = torch.nn.functional.silu(problem.x @ gate.T) * (problem.x @ up.T)
        kept = a @ down.T
    frozen = sum(size for place, size in packed.items() if place not in (gate.data_ptr(), up.data_ptr(), down.data_ptr()))
    assert kept.requires_grad
    assert saved_bytes(problem)[0] < 0.7 * frozen


@every_kind
@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B", "bias"), ()])
def test_only_wanted_gradients_are_computed(kind, needs, monkeypatch):
    asked = gradients_asked(monkeypatch)
    ours(sized(kind, needs=needs).draw())
    fields = tuple(name for name in FIELDS if name in needs)
    assert asked == ([Needs("x" in needs, (fields,) * 3)] if needs else [])


@every_kind
@every_form
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(kind, form, use_reentrant, device):
    problem = Case(device=device, **form).draw()

    def mlp(x):
        own = [problem.members.get(name) for name in ("gate", "up", "down")]
        return lora_glu_mlp(x, *own, dropout_p=0.4)

    gradients = []
    for compute in (mlp, lambda x: checkpoint(mlp, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = compute(problem.x)
        for leaf in problem.leaves.values():
            leaf.grad = None
        y.backward(problem.dys["y"])
        gradients.append([leaf.grad for leaf in problem.leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_kind
def test_backward_twice_gives_the_same(kind, device):
    """No saved tensor is written to: da's memory becomes de, and a's becomes du, not e's or u's."""
    problem = sized(kind, p=0.2, device=device).draw()
    (y,) = problem.case.call(problem.x, problem.members)
    leaves = list(problem.leaves.values())
    first = torch.autograd.grad(y, leaves, problem.dys["y"], retain_graph=True)
    second = torch.autograd.grad(y, leaves, problem.dys["y"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_kind
def test_second_derivative_is_an_error(kind, device):
    problem = Case(device=device).draw()
    (y,) = problem.case.call(problem.x, problem.members)
    (dx,) = torch.autograd.grad(y.square().sum(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_glu_mlp: the second derivative is not implemented"):
        dx.sum().backward()


@every_form
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("needs", [("x", "lora_A", "lora_B", "bias"), ("lora_B",), ()])
def test_opcheck(form, p, quant_type, needs, device):
    layers = {"gate": Layer(0, None, quant_type=quant_type), "up": Layer(0), "down": Layer(0, 3, False), **form}
    problem = Case(M=6, p=p, dtype=BF16, needs=needs, device=device, **layers).draw()
    members = tuple(m._replace(scaling=torch.tensor(0.5)) for m in problem.members.values())
    about, options = ("auto", BF16), ("silu",)
    pieces = flatten((*about, problem.x, members, problem.dropout(), options))
    opcheck(torch.ops.lora_kernels.glu_mlp, tuple(pieces))
    if needs:
        fields = [tuple(name for name in FIELDS if name in needs and getattr(m, name) is not None) for m in members]
        wanted = Needs("x" in needs, tuple(fields))
        _, saved = reference.forward(problem.x, members, problem.dropout(), "silu")
        own = kept(problem.x, members, saved, problem.dropout(), wanted)
        tensors, *rest = flatten((*about, (problem.dys["y"],), *own, wanted, options))
        opcheck(torch.ops.lora_kernels.glu_mlp_backward, ([t.detach() for t in tensors], *rest))
