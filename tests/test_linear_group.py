"""lora_linear_group against float64: members of other ranks, scalings, widths, dtypes of adapter, with and without adapter."""

import itertools
from dataclasses import replace

import pytest
import torch
from kinds import DTYPES, Kind
from members_accuracy import check, every_dtype, every_kind, saved_bytes
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRAWeights, dropout_mask, lora_linear, lora_linear_group, quantize_nf4
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer, ours

BF16, FP16, FP32, FP64 = DTYPES


def members(kind, *layers):
    return tuple(replace(layer, quant_type=kind.quant_type) for layer in layers)


QKV = (Layer(33), Layer(10, 3, scaling=0.5), Layer(9, 5, bias=False, scaling=-1.5))
MIXED = (Layer(33, None), Layer(10, 3), Layer(9, None, bias=False))


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layers", [QKV, MIXED, (Layer(9, None),)])
def test_gradcheck(p, layers):
    """Numerical differentiation, which shares nothing with the reference."""
    case = GroupCase(M=(2, 3), K=9, members=layers, p=p, dtype=FP64, needs=("x", "weight", "lora_A", "lora_B", "bias"))
    problem = case.draw()
    leaves = problem.leaves

    def compute(*tensors):
        return case.call(problem.x, problem.members)

    assert torch.autograd.gradcheck(compute, list(leaves.values()))


@every_dtype
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("M", [1, 17, 129])
@pytest.mark.parametrize("layers", [QKV, MIXED])
def test_rows(kind, dtype, M, p, layers, device):
    check(GroupCase(M=M, K=70, members=members(kind, *layers), p=p, dtype=dtype, device=device))


@every_dtype
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides(kind, dtype, shape, strided, device):
    check(GroupCase(M=shape, members=members(kind, *QKV), p=0.2, dtype=dtype, strided=strided, device=device))


@every_kind
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(kind, dtype, adapter, device):
    case = GroupCase(M=40, K=64, members=members(kind, *QKV), p=0.1, dtype=dtype, adapter_dtype=adapter, device=device)
    check(case)


@every_kind
@pytest.mark.parametrize("frozen", [n for k in range(4) for n in itertools.combinations("qkv", k)])
@pytest.mark.parametrize("needs", [("x", "lora_A"), ("lora_B", "bias"), ("x",)])
def test_frozen_members(kind, frozen, needs, device):
    check(GroupCase(members=members(kind, *QKV), p=0.3, needs=needs, frozen=frozen, device=device))


@every_kind
def test_a_group_of_five_and_of_dense_and_4_bit_weights(kind, device):
    layers = (*QKV, Layer(12, None, quant_type="nf4"), Layer(64, 40, quant_type="nf4"))
    for dtype in (BF16, FP32):
        check(GroupCase(M=65, K=64, members=layers, p=0.1, dtype=dtype, device=device))


@every_kind
@pytest.mark.parametrize("narrow", [BF16, FP16])
def test_autocast(kind, narrow, device):
    check(GroupCase(M=65, K=64, members=members(kind, *QKV), p=0.1, autocast=narrow, device=device))


@every_kind
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_is_lora_linear_of_each_member(kind, p, device):
    """With the masks of offsets 0, 1, 2; the first is lora_linear's own."""
    problem = GroupCase(M=33, K=64, members=members(kind, *QKV), p=p, device=device).draw()
    ys = ours(problem)
    for i, (name, (W, A, B, c, s, _)) in enumerate(problem.members.items()):
        dropped = dropped_x(problem, i) if p else problem.x
        low_rank = s * (dropped @ A.T) @ B.T
        base = lora_linear(problem.x, W, torch.zeros_like(A), B, c)
        assert torch.allclose(ys[name], base + low_rank, atol=1e-4)
    first = next(iter(problem.members.values()))
    alone = lora_linear(problem.x, *first[:4], scaling=first.scaling, dropout_p=p, seed=problem.case.seed)
    assert torch.allclose(ys["q"], alone, atol=1e-5)


def dropped_x(problem, offset):
    M, K = problem.x.shape
    keep = dropout_mask(M, K, problem.case.p, problem.case.seed, offset=offset, device=problem.x.device)
    return problem.x * keep * 65536 / (65536 - round(65536 * problem.case.p))


@every_kind
@pytest.mark.parametrize("unused", [n for k in range(1, 3) for n in itertools.combinations("qkv", k)])
def test_a_result_that_is_not_used_costs_no_gradient(kind, unused, device):
    problem = GroupCase(members=members(kind, *QKV), p=0.3, device=device).draw()
    whole = ours(problem)
    partly = replace(problem, dys={name: dy for name, dy in problem.dys.items() if name not in unused})
    found = ours(partly)
    assert not [name for name in found if name[1:].partition(".")[0] in unused]
    for name, grad in found.items():
        if name != "dx":
            assert torch.equal(grad, whole[name])


@pytest.mark.parametrize("kind", [Kind("torch", "nf4"), Kind("cpu", "nf4")], ids=str, indirect=True)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_parts_of_dx_are_rounded_once(kind, dtype, monkeypatch):
    """Of two members, whose parts cancel, on a CPU that multiplies no 16-bit numbers."""
    monkeypatch.setattr("lora_kernels.backends.products.cpu_multiplies", lambda _: False)
    member = LoRAWeights(quantize_nf4(torch.randn(33, 64)), torch.randn(3, 64, dtype=dtype), torch.randn(33, 3, dtype=dtype))
    x, dy = torch.randn(9, 64, dtype=dtype, requires_grad=True), torch.randn(9, 33, dtype=dtype)
    q, k = lora_linear_group(x, (member, member))
    (part,), (dx,) = torch.autograd.grad(q, x, dy, retain_graph=True), torch.autograd.grad((q, k), x, (dy, -dy))
    assert dx.abs().max() < 1e-5 * part.abs().max()


@every_kind
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes(kind, p, device):
    """x once, h of each member, one seed."""
    case = GroupCase(M=(4, 32), K=128, members=members(kind, *QKV), p=p, dtype=BF16, device=device)
    assert saved_bytes(case.draw()) == (2 * 128 * (4 + 3 + 5) + (8 if p else 0), True)


@every_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(kind, use_reentrant, device):
    problem = GroupCase(members=members(kind, *QKV), device=device).draw()

    def layer(x):
        return lora_linear_group(x, list(problem.members.values()), dropout_p=0.4)

    gradients = []
    for compute in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        ys = compute(problem.x)
        for leaf in problem.leaves.values():
            leaf.grad = None
        torch.autograd.backward(ys, list(problem.dys.values()))
        gradients.append([leaf.grad for leaf in problem.leaves.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_kind
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled(kind, dtype, device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, ms: lora_linear_group(x, ms, dropout_p=0.3, seed=20260), fullgraph=True)
    for M in (17, (2, 3)):
        case = GroupCase(M=M, members=members(kind, *MIXED[:2], *QKV[1:]), p=0.3, dtype=dtype, device=device)
        check(case, lambda problem: problem.compute(lambda x, ms: compiled(x, list(ms.values()))))


W, A, B = torch.ones(6, 4), torch.ones(2, 4), torch.ones(6, 2)


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ([], ValueError, "members: got none"),
        ([LoRAWeights(W, A, B), (W, A, B)], TypeError, r"members\[1\]: got tuple, expected LoRAWeights"),
        ([LoRAWeights(W, A, B), LoRAWeights(W, A, None)], TypeError, r"members\[1\].lora_B: got NoneType"),
        ([LoRAWeights(W, A, B), LoRAWeights(W.T, A, B)], ValueError, r"members\[1\].lora_A: got shape \(2, 4\)"),
        (
            [LoRAWeights(W, None, None), LoRAWeights(W[:, :3], None, None)],
            ValueError,
            r"x: got shape \(3, 4\), expected \[\.\.\., 3\]",
        ),
        ([LoRAWeights(W, A, B), LoRAWeights(W.double(), A, B)], TypeError, r"expected torch.float64 as members\[1\].weight"),
    ],
)
def test_errors(group, error, words):
    with pytest.raises(error, match=words):
        lora_linear_group(torch.ones(3, 4), group)
