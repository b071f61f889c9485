"""lora_linear(magnitude=m), DoRA: y = (m/n)⊙(x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + c against float64 with n constant; and its norm."""

import itertools
from dataclasses import replace

import pytest
import torch
from accuracy import Case, check, check_contract, contract, ours
from kinds import DTYPES, KINDS, every_dense_kind, every_dtype, every_dtype_of
from members_accuracy import check as check_members
from members_accuracy import saved_bytes

from lora_kernels import LoRAWeights, dora_norm, lora_glu_mlp, lora_linear, use_backend
from lora_kernels.backends.torch import magnitude as steps
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer
from lora_kernels.functional.nf4 import quantize

BF16, FP16, FP32, FP64 = DTYPES
OWN = KINDS[:6]  # "cuda" takes Triton's steps of a magnitude: test_rows has it
every_kind = pytest.mark.parametrize("kind", OWN, ids=str, indirect=True)


def dora(**options):
    return Case(dora=True, **options)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_gradcheck(p, bias, quant_type):
    """Numerical differentiation in x, c and m, of which n is no function."""
    case = dora(M=(2, 3), K=9, N=5, R=2, bias=bias, dtype=FP64, needs=("x", "c", "m"), quant_type=quant_type)
    problem = case.draw()

    def compute(*leaves):
        inputs = {**problem.inputs, **dict(zip(problem.leaves, leaves, strict=True))}
        m = inputs.pop("m")
        return lora_linear(*inputs.values(), magnitude=m, scaling=0.7, dropout_p=p, seed=3)

    with use_backend("torch"):
        assert torch.autograd.gradcheck(compute, list(problem.leaves.values()))


def test_gradients_of_adapters_where_the_norm_is_constant():
    """By numerical differentiation: rows of A that are orthogonal to those of W turn W + s·B·A by second order alone."""
    W, A = torch.zeros(3, 6, dtype=FP64), torch.zeros(2, 6, dtype=FP64)
    W[:, :3], A[:, 3:] = torch.randn(3, 3, dtype=FP64), torch.randn(2, 3, dtype=FP64)
    B, m, x = torch.zeros(3, 2, dtype=FP64, requires_grad=True), torch.randn(3, dtype=FP64), torch.randn(4, 6, dtype=FP64)
    with use_backend("torch"):
        assert torch.autograd.gradcheck(lambda B: lora_linear(x, W, A, B, magnitude=m, scaling=2.0), (B,))


@every_dtype
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [1, 70])
def test_rows(kind, M, p, dtype, device):
    check(dora(M=M, K=130, N=67, R=32, p=p, dtype=dtype, device=device, quant_type=kind.quant_type))


@every_dtype_of(OWN)
@pytest.mark.parametrize(("K", "N", "R"), [(33, 40, 1), (40, 301, 3), (300, 37, 12), (129, 65, 130)])
def test_features_and_ranks(kind, K, N, R, dtype, device):
    check(dora(M=33, K=K, N=N, R=R, p=0.25, dtype=dtype, device=device, quant_type=kind.quant_type, blocksize=64))


@every_kind
def test_one_feature(kind, device):
    """Whose results of one element take many draws to judge."""
    check(dora(M=33, K=1, N=1, R=1, p=0.25, dtype=BF16, device=device, quant_type=kind.quant_type, blocksize=64))


@every_kind
@pytest.mark.parametrize("shape", [(), (3, 4), (3, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides(kind, shape, strided, device):
    check(dora(M=shape, p=0.2, dtype=BF16, strided=strided, device=device, quant_type=kind.quant_type))


@every_kind
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
@pytest.mark.parametrize("bias", [False, True])
def test_adapters_of_another_dtype(kind, dtype, adapter, bias, device):
    check(
        dora(M=40, K=64, R=8, p=0.1, dtype=dtype, adapter_dtype=adapter, bias=bias, device=device, quant_type=kind.quant_type)
    )


@every_kind
@pytest.mark.parametrize("needs", [n for k in range(6) for n in itertools.combinations("xABcm", k)], ids="".join)
def test_every_combination_of_gradients(kind, needs, device):
    check(dora(p=0.3, needs=needs, device=device, quant_type=kind.quant_type))


@every_dense_kind
@pytest.mark.parametrize("needs", ["W", "WA", "xWABcm"])
def test_a_trained_weight(kind, needs, device):
    check(dora(p=0.3, needs=tuple(needs), device=device))


@every_kind
def test_contract(kind, device):
    problem = dora(M=33, K=64, p=0.2, device=device, quant_type=kind.quant_type).draw()
    check_contract(problem, contract(problem))


@every_kind
@pytest.mark.parametrize("scaling", [0.0, -1.5, torch.tensor(0.5)])
def test_scalings(kind, scaling, device):
    check(dora(scaling=scaling, device=device, quant_type=kind.quant_type))


@every_kind
def test_autocast(kind, device):
    check(dora(K=64, p=0.2, autocast=BF16, device=device, quant_type=kind.quant_type))


@every_kind
def test_members(kind, device):
    layers = (Layer(33, dora=True), Layer(10, 3, scaling=0.5), Layer(9, None), Layer(12, 5, bias=False, dora=True))
    layers = tuple([Layer(**{**vars(layer), "quant_type": kind.quant_type}) for layer in layers])
    check_members(GroupCase(M=40, K=64, members=layers, p=0.2, device=device))


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_compiled_equals_eager(backend, device):
    torch._dynamo.reset()
    problem = dora(M=17, p=0.3, device=device).draw()

    def compute(x, W, A, B, c, m):
        return lora_linear(x, W, A, B, c, magnitude=m, scaling=0.5, dropout_p=0.3, seed=20260)

    with use_backend(backend):
        expected = problem.compute(compute)
        found = problem.compute(torch.compile(compute, fullgraph=True, backend="aot_eager"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# ---- what is saved ----


@pytest.mark.parametrize(
    ("needs", "numbers"), [("xABcm", 64 * 8 + 64 * 96 + 96), ("xABc", 64 * 8 + 96), ("m", 64 * 96 + 96), ("x", 96), ("c", 0)]
)
def test_saved_bytes(needs, numbers):
    """Beyond x and the weights: LoRA's h, v of y's size for dm alone, and n."""
    names = {"x": "x", "A": "lora_A", "B": "lora_B", "c": "bias", "m": "magnitude"}
    case = GroupCase(M=64, K=128, members=(Layer(96, 8, dora=True),), needs=tuple([names[name] for name in needs]))
    assert saved_bytes(case.draw())[0] == 4 * numbers


def test_output_may_be_modified_in_place():
    """v is kept, and not y."""
    problem = dora(p=0.2, scaling=1.0, bias=False).draw()
    inputs = problem.inputs
    y = lora_linear(*list(inputs.values())[:-1], magnitude=inputs["m"], dropout_p=0.2, seed=problem.case.seed)
    y.mul_(2).add_(1)
    y.backward(problem.dy)
    assert torch.allclose(problem.m.grad, 2 * ours(problem)["dm"], rtol=1e-5)


# ---- where n or m is zero ----


@every_kind
def test_a_row_of_zeros(kind, device):
    """n = 0: the result is the bias, and neither NaN nor a gradient but the bias's comes from there."""
    problem = dora(K=64, needs=("x", "B", "c", "m"), device=device).draw()
    x, W, A, B, c, m = [t.detach() for t in problem.inputs.values()]
    W[3], B[3] = 0, 0
    W = W if kind.quant_type is None else quantize(W.to(BF16), kind.quant_type, 64, True)
    x, B, c, m = (t.requires_grad_() for t in (x, B, c, m))
    y = lora_linear(x, W, A, B, c, magnitude=m)
    assert torch.equal(y[:, 3], c[3].expand(len(y)))
    y.backward(problem.dy)
    assert not B.grad[3].any()
    assert m.grad[3] == 0
    assert all(t.grad.isfinite().all() for t in (x, B, c, m))


@every_kind
def test_a_magnitude_of_zero_has_its_gradient(kind, device):
    """dm is no function of m, so that half of the magnitudes may be others."""

    def with_zeros(problem):
        m = problem.m.detach().clone()
        m[::2] = 0
        return {**ours(problem), "dm": ours(replace(problem, m=m.requires_grad_()))["dm"]}

    check(dora(K=64, device=device, quant_type=kind.quant_type), with_zeros)


# ---- dora_norm ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", [None, "nf4", "fp4"])
@pytest.mark.parametrize("given", [False, True])
def test_norm(dtype, quant_type, given):
    if quant_type and dtype == FP64:
        dtype = FP32
    problem = Case(K=192, N=700, R=5, dtype=dtype, quant_type=quant_type, base_dtype=dtype).draw()
    W, A, B = problem.W, problem.A.detach(), problem.B.detach()
    dense = W.dequantize() if quant_type else W
    exact = torch.linalg.vector_norm(dense.double() + 0.7 * B.double() @ A.double(), dim=1)
    squared = (dense.double() ** 2).sum(1).to(FP64 if dtype == FP64 else FP32) if given else None
    n = dora_norm(W, A, B, 0.7, squared_weight_norm=squared)
    assert n.dtype == (FP64 if dtype == FP64 else FP32)
    assert not n.requires_grad
    assert torch.allclose(n.double(), exact, rtol=1e-12 if dtype == FP64 else 2e-6)


@pytest.mark.parametrize("given", [False, True])
def test_norm_where_it_cancels(given):
    """ΔW ≈ −W: the difference of float32 sums of size 1 would be noise, or negative."""
    W, A = torch.randn(40, 8), torch.eye(8)
    B = -W * (1 + 1e-4 * torch.randn_like(W))
    B[0] = -W[0]
    exact = torch.linalg.vector_norm(W.double() + B.double() @ A.double(), dim=1)
    n = dora_norm(W, A, B, 1.0, squared_weight_norm=(W**2).sum(1) if given else None)
    assert torch.allclose(n.double(), exact, rtol=1e-6)
    assert n[0] == 0


def test_norm_under_autocast_is_float32():
    W, A, B = torch.randn(9, 70), torch.randn(3, 70), torch.randn(9, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora_norm(W, A, B, 2.0), dora_norm(W.clone(), A, B, torch.tensor(2.0)))


X, W, A, B, C = torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(2, 4), torch.zeros(6, 2), torch.zeros(6)


@pytest.mark.parametrize(
    ("compute", "error", "message"),
    [
        (lambda: lora_linear(X, W, A, B, magnitude=C[:5]), ValueError, r"magnitude: got shape \(5,\), expected \(6,\)"),
        (lambda: lora_linear(X, W, A, B, magnitude=C[:, None]), ValueError, r"magnitude: got shape \(6, 1\)"),
        (lambda: lora_linear(X, W, A, B, magnitude=2.0), TypeError, "magnitude: got float, expected a torch.Tensor"),
        (lambda: lora_linear(X, W, A, B, magnitude=C.int()), TypeError, r"magnitude: got dtype torch.int32"),
        (lambda: lora_linear(X, W, A, B, magnitude=C.to("meta")), ValueError, "magnitude: got a tensor on meta"),
        (
            lambda: lora_glu_mlp(X, LoRAWeights(W, A, B, magnitude=C), LoRAWeights(W, A, B), LoRAWeights(W.T, B.T, A.T)),
            ValueError,
            "gate.magnitude: got one, expected None",
        ),
        (lambda: dora_norm(W, A, None, 1.0), TypeError, "lora_A, lora_B: got None"),
        (lambda: dora_norm(W, A, B[:5], 1.0), ValueError, r"lora_B: got shape \(5, 2\), expected \(6, 2\)"),
        (
            lambda: dora_norm(W, A, B, 1.0, squared_weight_norm=torch.zeros(5)),
            ValueError,
            r"squared_weight_norm: got torch.float32 of shape \(5,\), expected torch.float32 of \(6,\)",
        ),
    ],
)
def test_arguments_that_do_not_fit(compute, error, message):
    with pytest.raises(error, match=message):
        compute()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pytorch_s_steps_in_several_chunks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dy, v = torch.randn(2, 50, 24).to(dtype)
    m, n, c = torch.rand(3, 24) + 1

    def computed():
        norm = steps.norm(v, torch.ones(3, 24), dy[:, :3].float(), 0.5, dtype)
        return norm, steps.scale(v, m, n, c), *steps.scale_backward(dy, v, m, n, True, True, True)

    whole = computed()
    monkeypatch.setattr("lora_kernels.mask.chunk_elements", lambda device: 16 * 24)
    monkeypatch.setattr(steps, "TILE", 16 * 24)
    parts = computed()
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want)
