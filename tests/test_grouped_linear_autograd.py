"""lora_grouped_linear and multi_lora_linear under autograd, torch.compile and PyTorch's modes; their operators."""

import threading

import pytest
import torch
from accuracy import gradients_asked
from members_accuracy import saved_bytes
from segments_accuracy import FORMS, case_of, every_form, every_kind
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAAdapter, Segments, lora_grouped_linear, multi_lora_linear, scratch
from lora_kernels.cases.grouped_linear import GroupedCase, MultiCase
from lora_kernels.cases.members import ours
from lora_kernels.functional.grouped_linear import kept
from lora_kernels.reference import grouped_linear as reference
from lora_kernels.values import LoRAWeights, Needs, flatten

BF16 = torch.bfloat16
FIELDS = ("weight", "lora_A", "lora_B", "bias")
BIG = {"M": 128, "K": 64, "N": 48, "sizes": (50, 0, 60, 10)}


# ---- what is saved, and which gradients are computed ----


@every_kind
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes(kind, p, device):
    """h of the largest rank, one seed, the offsets; of rows in any order the order, which all layers share. No rows of x."""
    seed = 8 if p else 0
    for form in ("own", "shared"):
        problem = case_of(form, kind, **BIG | {"p": p, "dtype": BF16, "device": device}).draw()
        assert saved_bytes(problem) == (2 * 128 * 4 + 4 * 5 + seed, True)
    problem = case_of("adapters", kind, **BIG | {"p": p, "dtype": BF16, "device": device}).draw()
    assert saved_bytes(problem) == (2 * 128 * 7 + 4 * 5 + 8 * 128 + seed, True)


@pytest.mark.parametrize(
    ("needs", "elements", "seed", "x_saved"),
    [
        (("x",), 0, 8, False),
        (("lora_A",), 0, 8, True),
        (("lora_B",), 4, 0, False),
        (("bias",), 0, 0, False),
        (("weight",), 0, 0, True),
        ((), 0, 0, False),
    ],
)
def test_only_what_a_wanted_gradient_reads_is_saved(needs, elements, seed, x_saved, device):
    problem = GroupedCase(**BIG, p=0.1, needs=needs, device=device).draw()
    assert saved_bytes(problem) == (4 * 128 * elements + seed + (4 * 5 if needs else 0), x_saved)


@every_form
@pytest.mark.parametrize("needs", [("x",), ("lora_A",), ("lora_B", "bias"), ()])
def test_only_wanted_gradients_are_computed(form, needs, monkeypatch):
    asked = gradients_asked(monkeypatch)
    case, own = FORMS[form]
    ours(case(needs=needs, **own).draw())
    adapters, base = (tuple(n for n in needs if n in names) for names in (("lora_A", "lora_B"), ("weight", "bias")))
    members = ((*adapters, *base),) if form != "adapters" else (base, *(adapters,) * 4)
    assert asked == ([Needs("x" in needs, members)] if needs else [])


class Allocated(TorchDispatchMode):
    """The bytes of the largest tensor that is made, beside those that are there."""

    def __init__(self, *there):
        super().__init__()
        self.there, self.largest = {t.untyped_storage().data_ptr() for t in there}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.there:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@every_form
def test_no_stack_of_deltas_and_no_padded_rows(form, device, monkeypatch):
    """Of 64 segments of 8 rows nothing is made that is larger than x, y or a gradient of the stacked A."""
    monkeypatch.setattr(scratch, "_kept", threading.local())  # what other tests needed
    case, own = FORMS[form]
    own = own | ({"ranks": (2,) * 64, "scalings": (1.0,) * 64} if form == "adapters" else {"R": 2})
    problem = case(M=512, K=256, N=256, sizes=(8,) * 64, p=0.1, device=device, **own).draw()
    with Allocated(*problem.tensors().values()) as allocated:
        ours(problem)
    assert allocated.largest == problem.x.nbytes


@every_form
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(form, use_reentrant, device):
    case, own = FORMS[form]
    problem = case(device=device, p=0.4, seed=None, **own).draw()  # drawn from the generator, whose state is restored
    gradients = []

    def layer(x):
        return problem.case.call(x, problem.members)[0]

    for compute in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = compute(problem.x)
        for leaf in problem.leaves.values():
            leaf.grad = None
        y.backward(problem.dys["y"])
        gradients.append([leaf.grad for leaf in problem.leaves.values()])
    for a, b in zip(*gradients, strict=True):
        assert (a is b is None) or torch.equal(a, b)


@every_form
def test_backward_twice_gives_the_same(form, device):
    case, own = FORMS[form]
    problem = case(p=0.2, device=device, **own).draw()
    (y,) = problem.case.call(problem.x, problem.members)
    leaves = [leaf for name, leaf in problem.leaves.items() if not name.startswith("adapter1")]
    first = torch.autograd.grad(y, leaves, problem.dys["y"], retain_graph=True)
    second = torch.autograd.grad(y, leaves, problem.dys["y"])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_form
def test_second_derivative_is_an_error(form, device):
    case, own = FORMS[form]
    problem = case(device=device, **own).draw()
    (y,) = problem.case.call(problem.x, problem.members)
    (dx,) = torch.autograd.grad(y.square().sum(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="lora_grouped_linear: the second derivative is not implemented"):
        dx.sum().backward()


# ---- the registered operators ----


@every_form
@pytest.mark.parametrize(("p", "quant_type"), [(0.0, None), (0.3, "nf4")])
@pytest.mark.parametrize("needs", [("x", "lora_A", "lora_B", "bias"), ("weight", "lora_A"), ()])
def test_opcheck(form, p, quant_type, needs, device):
    case, own = FORMS[form]
    own = own | ({"K": 32, "N": 8} if quant_type else {})
    problem = case(M=9, sizes=(3, 0, 4, 1), p=p, dtype=BF16, needs=needs, quant_type=quant_type, device=device, **own).draw()
    members = tuple(m._replace(scaling=torch.tensor(0.5, device=device)) for m in problem.members.values())
    about, options = ("auto", BF16), (problem.case.rows(), problem.case.dropouts())
    dropout = problem.dropout()
    opcheck(torch.ops.lora_kernels.grouped_linear, tuple(flatten((*about, problem.x, members, dropout, options))))
    if any(leaf.requires_grad for leaf in problem.tensors().values()):
        fields = [tuple(n for n in FIELDS if isinstance(t := getattr(m, n), torch.Tensor) and t.requires_grad) for m in members]
        wanted = Needs(problem.x.requires_grad, tuple(fields))
        _, saved = reference.forward(problem.x, members, dropout, *options)
        pieces = flatten((*about, (problem.dys["y"],), *kept(problem.x, members, saved, dropout, wanted), wanted, options))
        tensors, *rest = pieces
        opcheck(torch.ops.lora_kernels.grouped_linear_backward, ([t.detach() for t in tensors], *rest))


@every_form
def test_compiled(form, device):
    """As eager, with the segments made in the graph or before it; other sizes are no new graph; an absent adapter has zeros."""
    torch._dynamo.reset()
    case, own = FORMS[form]
    counter = CompileCounterWithBackend("aot_eager")

    def layer(x, ids, members):
        segments = Segments.from_ids(ids, 4)
        if form == "adapters":
            base, *own = members
            adapters = [LoRAAdapter(m[1], m[2], m[4], p) for m, p in zip(own, (0.3, 0.0, 0.15, 0.3), strict=True)]
            return multi_lora_linear(x, base[0], adapters, segments, base[3], seed=20260)
        W, A, B, c, s, _ = members[0]
        return lora_grouped_linear(x, W, A, B, segments, c, scaling=s, dropout_p=0.3, seed=20260)

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for M, sizes in ((17, (5, 0, 9, 2)), (17, (0, 16, 1, 0)), (40, (10, 0, 20, 7))):
        problem = case(M=M, sizes=sizes, p=0.3, device=device, **own).draw()
        ids, members = problem.case.ids().to(device), tuple(problem.members.values())
        found = problem.compute(lambda x, _, ids=ids, members=members: (compiled(x, ids, members),))
        expected = ours(problem)
        for name, value in found.items():
            torch.testing.assert_close(value, expected.get(name, torch.zeros_like(value)))
    assert counter.frame_count <= 2


def test_compiled_with_segments_from_outside(device):
    """Made once before the layers, as a model does: their sizes differ at each step, and the graph does not depend on them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, W, A, B, s: lora_grouped_linear(x, W, A, B, s), backend=counter, fullgraph=True)
    for sizes in ((5, 0, 9, 2), (0, 16, 1, 0), (1, 2, 3, 4)):
        problem = GroupedCase(sizes=sizes, device=device, bias=False, scaling=1.0).draw()
        W, A, B, *_ = problem.members["experts"]
        y = compiled(problem.x, W, A, B, problem.case.segments())
        torch.testing.assert_close(y, ours(problem)["y"])
        (grad,) = torch.autograd.grad(y.sum(), A)
        assert grad.shape == A.shape
    assert counter.frame_count == 1


def test_export_with_dynamic_rows(device):
    class Layer(torch.nn.Module):
        def forward(self, x, ids, W, A, B):
            return multi_lora_linear(x, W, [LoRAAdapter(A, B), LoRAAdapter(2 * A, B)], Segments.from_ids(ids, 2))

    def inputs(M):
        shapes = (M, 12), (10, 12), (3, 12), (10, 3)
        x, *weights = (torch.randn(shape, device=device) for shape in shapes)
        return x, torch.arange(M, device=device) % 3 - 1, *weights

    rows = Dim("rows")
    exported = export(Layer(), inputs(7), dynamic_shapes=({0: rows}, {0: rows}, {}, {}, {})).module()
    for M in (7, 20):
        own = inputs(M)
        torch.testing.assert_close(exported(*own), Layer()(*own))


# ---- PyTorch's modes ----


@every_form
def test_fake_tensors_and_the_meta_device(form, device):
    case, own = FORMS[form]
    with FakeTensorMode():
        problem = case(dtype=BF16, p=0.1, device=device, **own).draw()
        y = problem.case.call(problem.x, problem.members)[0]
        assert (y.shape, y.dtype) == ((17, 33), BF16)
    problem = case(p=0.1, device=torch.device("meta"), **own).draw()
    y = problem.case.call(problem.x, problem.members)[0]
    y.sum().backward()
    assert (y.shape, y.device.type) == ((17, 33), "meta")
    assert problem.x.grad.shape == problem.x.shape


@every_form
def test_backward_inside_autocast_is_the_one_outside(form, device):
    case, own = FORMS[form]
    problem = case(p=0.3, autocast=BF16, adapter_dtype=torch.float32, device=device, **own).draw()
    outside = ours(problem)
    with torch.autocast(device.type, BF16):
        (y,) = problem.case.call(problem.x, problem.members)
        leaves = {name: leaf for name, leaf in problem.leaves.items() if f"d{name}" in outside}
        grads = torch.autograd.grad(y, list(leaves.values()), problem.dys["y"])
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, outside[f"d{name}"]), name


def test_what_autograd_is_not_told_is_refused():
    x, W, A, B = torch.ones(5, 4), torch.ones(3, 6, 4), torch.ones(3, 2, 4), torch.ones(3, 6, 2)
    segments = Segments.from_ids(torch.tensor([0, 0, 1, 2, 2]), 3)
    with pytest.raises(RuntimeError, match=r"lora_grouped_linear: torch.func's transforms"):
        torch.func.grad(lambda A: lora_grouped_linear(x, W, A, B, segments).sum())(A)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="lora_grouped_linear: forward-mode AD"):
        lora_grouped_linear(forward_ad.make_dual(x, x), W, A, B, segments)


def test_members_of_two_kinds_are_not_mixed_up(device):
    """A stack of one segment and a list of one adapter are the same layer."""
    x, W, A, B = (torch.randn(shape, device=device) for shape in ((5, 4), (6, 4), (2, 4), (6, 2)))
    segments = Segments.from_ids(torch.zeros(5, dtype=torch.int64, device=device), 1)
    first = lora_grouped_linear(x, W, A[None], B[None], segments, dropout_p=0.5, seed=3)
    assert torch.allclose(first, multi_lora_linear(x, W, [LoRAAdapter(A, B, 1.0, 0.5)], segments, seed=3), atol=1e-6)
    assert isinstance(MultiCase().draw().members["base"], LoRAWeights)
