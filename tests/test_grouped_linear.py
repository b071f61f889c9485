"""lora_grouped_linear and multi_lora_linear against float64: segments of any sizes, weights and biases of each or shared."""

import itertools
from dataclasses import replace

import pytest
import torch
from kinds import DTYPES
from segments_accuracy import DENSE, FORMS, SIZES, case_of, check, every_dtype, every_form, every_kind

from lora_kernels import LoRAAdapter, Segments, dropout_mask, lora_grouped_linear, lora_linear, multi_lora_linear, use_backend
from lora_kernels.backends.torch import grouped_linear
from lora_kernels.cases.grouped_linear import GroupedCase, MultiCase
from lora_kernels.cases.members import ours

BF16, FP16, FP32, FP64 = DTYPES


@every_form
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_gradcheck(form, p):
    """Numerical differentiation, which shares nothing with the reference."""
    case, own = FORMS[form]
    needs = ("x", "weight", "lora_A", "lora_B", "bias")
    problem = case(M=8, K=4, N=3, sizes=(3, 1, 0, 3), p=p, dtype=FP64, needs=needs, **own).draw()
    leaves = [leaf for name, leaf in problem.leaves.items() if not name.startswith("adapter2")]  # which takes no part
    assert torch.autograd.gradcheck(lambda *_: problem.case.call(problem.x, problem.members), leaves)


@every_dtype
@every_form
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(kind, dtype, form, sizes, device):
    M, of = SIZES[sizes]
    check(case_of(form, kind, M=M, sizes=of, p=0.2, dtype=dtype, device=device))


@every_kind
@every_form
@pytest.mark.parametrize(
    "needs", [n for k in range(1, 6) for n in itertools.combinations(("x", "weight", "lora_A", "lora_B", "bias"), k)]
)
def test_every_set_of_gradients(kind, form, needs, device):
    check(case_of(form, kind, p=0.3, needs=needs, device=device))


@every_kind
@every_form
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(kind, form, dtype, adapter, device):
    check(case_of(form, kind, M=40, sizes=(20, 0, 9, 2), p=0.1, dtype=dtype, adapter_dtype=adapter, device=device))


@every_kind
@every_form
@pytest.mark.parametrize("narrow", [BF16, FP16])
def test_autocast(kind, form, narrow, device):
    check(case_of(form, kind, M=40, sizes=(20, 0, 9, 2), p=0.1, autocast=narrow, device=device))


@every_kind
@every_form
@pytest.mark.parametrize("options", [{"bias": False}, {"strided": True}, {"dtype": BF16, "strided": True, "M": 20}])
def test_options(kind, form, options, device):
    check(case_of(form, kind, p=0.3, device=device, **options))


@every_kind
@pytest.mark.parametrize("own", [("weight",), ("bias",)])
@pytest.mark.parametrize("M", [17, 30])
def test_a_weight_or_a_bias_alone_is_each_segments_own(kind, own, M, device):
    needs = ("x", "weight", "lora_A", "bias")
    check(case_of("own", kind, own=own, M=M, p=0.2, needs=needs, device=device))


@every_kind
@pytest.mark.parametrize("scaling", [0, -3.0, torch.tensor(1.7)])
def test_scaling(kind, scaling, device):
    check(case_of("own", kind, scaling=scaling, p=0.1, device=device))
    check(case_of("adapters", kind, scalings=(scaling, 1.0, scaling, -2), p=0.1, device=device))


@every_kind
@pytest.mark.parametrize("shape", [(), (3, 6), (2, 0, 4)])
def test_leading_sizes(kind, shape, device):
    sizes = {0: (0, 0, 0, 0), 1: (0, 0, 1, 0), 18: (5, 0, 9, 2)}[torch.Size(shape).numel()]
    check(case_of("adapters", kind, M=shape, sizes=sizes, p=0.2, device=device))


@every_kind
@every_form
@pytest.mark.parametrize("most", [1, 4, 7])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_segments_in_several_blocks_of_rows(kind, form, most, dtype, monkeypatch, device):
    """Blocks begin within segments, and end within them, and where p changes."""
    monkeypatch.setattr(grouped_linear, "row_chunks", lambda M, width, device: [slice(0, most)])
    check(case_of(form, kind, M=40, sizes=(9, 0, 21, 4), p=0.5, dtype=dtype, device=device))


@pytest.mark.parametrize("form", ["own", "adapters"])
def test_a_block_stays_in_the_cache(form, monkeypatch):
    """Of 4096 columns no more than 256 rows."""
    lengths, whole = [], grouped_linear.low_rank

    def spying(y, h, x, order, block, dropout):
        lengths.append(block.place.stop - block.place.start)
        whole(y, h, x, order, block, dropout)

    monkeypatch.setattr(grouped_linear, "low_rank", spying)
    case, own = FORMS[form]
    with use_backend("torch"):
        ours(case(M=600, K=4096, N=8, sizes=(200, 0, 300, 100), needs=(), **own).draw())
    assert lengths == [256, 256, 88]


@every_kind
@pytest.mark.parametrize("frozen", [("base",), ("adapter0", "adapter3"), ("base", "adapter0", "adapter1", "adapter2")])
@pytest.mark.parametrize("needs", [("x", "lora_A", "lora_B", "bias"), ("lora_A",), ("lora_B",)])
def test_frozen_adapters(kind, frozen, needs, device):
    """Of one block, where p is 0 for all: without x's gradient nothing of a frozen one is there."""
    for p in (0.0, 0.3):
        check(case_of("adapters", kind, p=p, frozen=frozen, needs=needs, device=device))


@every_kind
def test_it_is_lora_linear_of_each_segment(kind, device):
    """Row i is row i of lora_linear with the adapter of its segment, mask included."""
    for form in ("shared", "adapters"):
        problem = case_of(form, kind, p=0.4, M=20, device=device).draw()
        members, y, segments = list(problem.members.values()), ours(problem)["y"], problem.case.segments()
        W, A, B, c, s, _ = members[0]
        for e in range(4):
            rows = slice(*segments.offsets[e : e + 2].tolist())
            rows = rows if form == "shared" else segments.order[rows]
            own = (
                (A[e], B[e], s, 0.4)
                if A is not None
                else (*members[e + 1][1:3], members[e + 1].scaling, (0.4, 0.0, 0.2)[e % 3])
            )
            alone = lora_linear(problem.x, W, *own[:2], c, scaling=own[2], dropout_p=own[3], seed=problem.case.seed)
            assert torch.allclose(y[rows], alone[rows], atol=1e-5), (form, e)


@pytest.mark.parametrize("kind", DENSE, ids=str, indirect=True)
@pytest.mark.parametrize("ps", [(0.5, 0.25), (0.5, 0.5)])
def test_the_mask_of_rows_that_lie_apart(kind, ps, device):
    """Row i's is row i of dropout_mask, in whatever runs the rows come; with one p in a block whose rows begin again."""
    ids = torch.tensor([0, 0, 1, 0, 1, 1, 1, -1, 0, 1], device=device)
    x, W = torch.ones(10, 40, device=device), torch.zeros(40, 40, device=device)
    adapters = [LoRAAdapter(torch.eye(40, device=device), torch.eye(40, device=device), 1.0, p) for p in ps]
    y = multi_lora_linear(x, W, adapters, Segments.from_ids(ids, 2), seed=3)
    for i, e in enumerate(ids.tolist()):
        p = (*ps, 0.0)[e]
        expected = dropout_mask(10, 40, p, 3, device=device)[i] / (1 - p) if e >= 0 else 0 * y[i]
        assert torch.equal(y[i], expected)


# ---- segments without rows, and rows without a segment ----


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_of_a_stack_a_segment_without_rows_has_zeros(dtype, device):
    problem = GroupedCase(dtype=dtype, needs=("x", "weight", "lora_A", "lora_B", "bias"), p=0.2, device=device).draw()
    found = ours(problem)
    for name in ("weight", "lora_A", "lora_B", "bias"):
        grad = found[f"dexperts.{name}"]
        assert not grad[1].any(), name
        assert grad[[0, 2, 3]].any(), name


@pytest.mark.parametrize("host", [True, False])
def test_of_a_list_an_adapter_without_rows_has_no_gradient(host, device):
    """Or zeros, where the host does not know its rows, as of ids on a GPU; and in a compiled graph (test_compiled)."""
    problem = MultiCase(p=0.2, device=device).draw()
    problem.case.host = host
    (y,) = problem.case.call(problem.x, problem.members)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if name.startswith("adapter")}
    grads = torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        if not name.startswith("adapter1"):
            assert grad.any(), name
        elif host:
            assert grad is None, name
        else:
            assert torch.equal(grad, torch.zeros_like(problem.leaves[name])), name


def test_an_optimizer_leaves_an_adapter_without_rows(device):
    problem = MultiCase(needs=("lora_A", "lora_B"), device=device).draw()
    before = {name: leaf.detach().clone() for name, leaf in problem.leaves.items()}
    optimizer = torch.optim.AdamW(problem.leaves.values(), weight_decay=0.5)
    problem.case.call(problem.x, problem.members)[0].sum().backward()
    optimizer.step()
    assert {name for name, leaf in problem.leaves.items() if torch.equal(leaf, before[name])} == {
        "adapter1.lora_A",
        "adapter1.lora_B",
    }


def test_nothing_reads_rows_of_no_segment(device):
    """Expert parallelism leaves what it does not own uninitialised."""
    problem = GroupedCase(M=30, p=0.3, needs=("x", "weight", "lora_A", "lora_B", "bias"), device=device).draw()
    expected = ours(problem)
    with torch.no_grad():
        problem.x[16:] = float("nan")
        problem.dys["y"][16:] = float("nan")
    found = ours(problem)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not found["y"][16:].any()
    assert not found["dx"][16:].any()


@pytest.mark.parametrize("form", ["own", "adapters"])
def test_it_is_deterministic(form, device):
    case, own = FORMS[form]
    problem = case(M=129, sizes=(64, 33, 1, 20), p=0.3, dtype=BF16, device=device, **own).draw()
    first, second = ours(problem), ours(problem)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_transposed_stack(device):
    """As experts keep it whose weights are [E, in, out]."""
    problem = GroupedCase(p=0.2, needs=("x", "weight", "lora_A"), device=device).draw()
    W, A, B, c, s, _ = problem.members["experts"]
    turned = W.detach().mT.contiguous().requires_grad_()
    expected = ours(problem)
    options = {"bias": c, "scaling": s, "dropout_p": 0.2, "seed": problem.case.seed}
    y = lora_grouped_linear(problem.x, turned.mT, A, B, problem.case.segments(), **options)
    assert torch.allclose(y, expected["y"], atol=1e-5)
    (grad,) = torch.autograd.grad(y, turned, problem.dys["y"])
    assert torch.allclose(grad.mT, expected["dexperts.weight"], atol=1e-5)


def test_numbers_that_change_need_no_new_case(device):
    """The sizes of segments do, at every step: what is kept of a kind of call does not hold them."""
    for sizes in ((5, 0, 9, 2), (0, 17, 0, 0), (1, 1, 1, 1)):
        for case in (GroupedCase(sizes=sizes, p=0.2, device=device), MultiCase(sizes=sizes, p=0.2, device=device)):
            check(case)
            check(replace(case, M=20))
