"""The registered operators of every operation: opcheck, torch.compile with fullgraph, fakes, agreement with eager mode."""

import pytest
import torch
from accuracy import Case, check
from kinds import every_kind
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from lora_kernels import lora_linear, quantize_nf4, use_backend
from lora_kernels.functional.linear import LINEAR, kept
from lora_kernels.operation import OPERATIONS, call
from lora_kernels.reference import linear as reference
from lora_kernels.values import Dropout, LoRAWeights, Needs, flatten

OPS = torch.ops.lora_kernels
FIELDS = ("weight", "lora_A", "lora_B", "bias")


def draw(device, count=1, p=0.3, needs=(), **options):
    """(x, members of different ranks and widths over it, dropout)."""
    problems = [Case(M=6, N=9 + i, R=3 + i, p=p, needs=needs, device=device, **options).draw() for i in range(count)]
    members = tuple(
        problem.member()._replace(scaling=torch.tensor(0.5 + i, device=device)) for i, problem in enumerate(problems)
    )
    return problems[0].x, members, Dropout(p, torch.tensor(7, device=device), 3 if count > 1 else 0) if p else None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_opcheck_forward(p, dtype, trained, quant_type, device):
    needs = tuple("xWABc") if trained else ()
    x, members, dropout = draw(device, p=p, needs=needs, dtype=dtype, quant_type=quant_type)
    opcheck(OPS.linear, tuple(flatten(("auto", dtype, x, members, dropout, ()))))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "needs", [Needs(True, (FIELDS[1:],)), Needs(True, ((),)), Needs(False, (("lora_A", "lora_B"),)), Needs(False, (("bias",),))]
)
def test_opcheck_backward(needs, double_quant, device):
    dtype = torch.bfloat16
    x, members, dropout = draw(device, dtype=dtype, quant_type="nf4", double_quant=double_quant)
    dy, h = torch.randn(6, 9, device=device).to(dtype), torch.randn(6, 3, device=device).to(dtype)
    opcheck(OPS.linear_backward, tuple(flatten(("auto", dtype, (dy,), *kept(x, members, (h,), dropout, needs), needs, ()))))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(kind, dtype, device):
    """Forward and backward as one graph each, with dropout, for several batch sizes; eager mode's rounding is not a graph's."""
    torch._dynamo.reset()

    def compute(*inputs):
        return lora_linear(*inputs, scaling=0.5, dropout_p=0.3, seed=20260)

    compiled = torch.compile(compute, fullgraph=True, backend="inductor" if kind.backend == "torch" else "aot_eager")
    for M in (17, 9, (3, 4)):
        case = Case(M=M, p=0.3, dtype=dtype, device=device, scaling=0.5, quant_type=kind.quant_type)
        check(case, lambda problem: problem.compute(compiled))


def test_compiled_with_other_numbers(device):
    """Another scaling is no new graph; another p is one."""
    torch._dynamo.reset()
    problem = Case(device=device).draw()
    compiled = torch.compile(lambda s, p: lora_linear(*problem.inputs.values(), scaling=s, dropout_p=p, seed=1), fullgraph=True)
    for s, p in ((0.5, 0.1), (0.25, 0.1), (4.0, 0.3), (-1.0, 0.0)):
        want = lora_linear(*problem.inputs.values(), scaling=s, dropout_p=p, seed=1)
        torch.testing.assert_close(compiled(s, p), want)


def test_compiled_with_drawn_seed_tensor_scaling_and_autocast(device):
    torch._dynamo.reset()
    problem = Case(device=device).draw()
    scaling = torch.tensor(0.5, device=device)

    @torch.compile(fullgraph=True)
    def compute(*inputs):
        with torch.autocast(device.type, torch.bfloat16):
            return lora_linear(*inputs, scaling=scaling, dropout_p=0.5)

    first, second = (compute(*problem.inputs.values()) for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    first.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in problem.leaves.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("unused", [(), (1,), (0, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_several_members(compiled, unused, p, device):
    """Three projections over one x, one of them NF4, each with its own mask; a result that is not used costs no gradient."""
    torch._dynamo.reset()
    x, members, dropout = draw(device, 3, p, needs=("x", "A", "B", "c"), dtype=torch.float32)
    members = (*members[:2], members[2]._replace(weight=quantize_nf4(members[2].weight)))
    used = [i for i in range(3) if i not in unused]
    leaves = [x, *(getattr(members[i], field) for i in range(3) for field in FIELDS[1:])]

    def ours(x, members):
        return call(LINEAR, x, members, dropout)

    with use_backend("torch"):
        compute = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
        ys = compute(x, members)
    want, _ = reference.forward(x, members, dropout)
    dys = [torch.randn_like(y) for y in want]
    assert all(torch.allclose(y, w, atol=1e-5) for y, w in zip(ys, want, strict=True))
    found, expected = (
        torch.autograd.grad([results[i] for i in used], leaves, [dys[i] for i in used], allow_unused=True)
        for results in (ys, want)
    )
    for leaf, grad in zip(found, expected, strict=True):
        if grad is None:  # a graph of AOTAutograd has zeros there
            assert leaf is None or (compiled and not leaf.any())
        else:
            assert torch.allclose(leaf, grad, atol=1e-4)


def test_a_tensor_in_two_members_gets_both_gradients(device):
    x, members, _ = draw(device, 1, 0.0, needs=("A", "B"), dtype=torch.float32)
    twice = (members[0], members[0])
    ys, (want, _) = call(LINEAR, x, twice, None), reference.forward(x, twice, None)
    for results in (ys, want):
        assert len(results) == 2
    found, expected = (
        torch.autograd.grad(results[0].sum() + 2 * results[1].sum(), members[0].lora_A) for results in (ys, want)
    )
    assert torch.allclose(found[0], expected[0], atol=1e-5)


def test_operators_check_their_arguments():
    x, member = torch.ones(3, 4), LoRAWeights(torch.ones(6, 4), torch.ones(2, 4), torch.ones(6, 2))
    for value, words in (
        ((torch.ones(3, 5), (member,), None), r"x: got shape \(3, 5\)"),
        ((x, (member,), Dropout(1.5, torch.tensor(3))), "dropout_p: got 1.5"),
        ((x, (member,), Dropout(0.5, torch.tensor(3.0))), "seed: got a torch.float32"),
    ):
        with pytest.raises(ValueError, match=words):
            OPS.linear(*flatten(("auto", torch.float32, *value, ())))
    with pytest.raises(ValueError, match="not a text of"):
        OPS.linear([x], [], "nothing of the kind")


def test_fake_tensors(device):
    """Shapes and dtypes are known without computing, as torch.export and memory planners need them."""
    with FakeTensorMode():
        problem = Case(M=(2, 3), dtype=torch.bfloat16, device=device).draw()
        y = lora_linear(*problem.inputs.values(), dropout_p=0.1, seed=3)
        assert (y.shape, y.dtype) == ((2, 3, 33), torch.bfloat16)


def test_every_operation_is_registered_under_its_name():
    assert OPERATIONS["linear"] is LINEAR
    assert all(operation.name == name and hasattr(OPS, name) for name, operation in OPERATIONS.items())
