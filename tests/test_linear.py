"""lora_linear against float64: every backend by name, dense and 4-bit weights, every option that changes the mathematics."""

from dataclasses import replace

import pytest
import torch
from accuracy import Case, check, check_contract, contract, ours
from kinds import DTYPES, KINDS, every_dense_kind, every_dtype, every_kind, every_needs
from properties import given, settings, st

from lora_kernels import lora_linear, use_backend
from lora_kernels.nf4.weight import BLOCKSIZES

BF16, FP16, FP32, FP64 = DTYPES


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quant_type", [None, "nf4", "fp4"])
def test_gradcheck(p, bias, quant_type):
    """Numerical differentiation, which shares nothing with the reference."""
    case = Case(M=(2, 3), K=9, N=5, R=2, bias=bias, dtype=FP64, needs=("x", "W", "A", "B", "c"), quant_type=quant_type)
    problem = case.draw()

    def compute(*leaves):
        inputs = {**problem.inputs, **dict(zip(problem.leaves, leaves, strict=True))}
        return lora_linear(*inputs.values(), scaling=0.7, dropout_p=p, seed=3)

    with use_backend("torch"):
        assert torch.autograd.gradcheck(compute, list(problem.leaves.values()))


@every_dtype
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [1, 17, 70])
def test_rows(kind, M, p, dtype, device):
    check(Case(M=M, K=130, N=67, R=32, p=p, dtype=dtype, device=device, quant_type=kind.quant_type))


@every_dtype
@pytest.mark.parametrize(("K", "N"), [(37, 301), (300, 37), (129, 65), (64, 256)])
def test_features(kind, K, N, dtype, device):
    check(Case(M=33, K=K, N=N, R=3, p=0.25, dtype=dtype, device=device, quant_type=kind.quant_type, blocksize=32))


@every_kind
def test_one_feature(kind, device):
    """Whose results of one element take many draws to judge."""
    check(Case(M=33, K=1, N=1, R=3, p=0.25, dtype=BF16, device=device, quant_type=kind.quant_type, blocksize=32))


@every_dtype
@pytest.mark.parametrize("R", [1, 4, 8, 12, 16, 24, 64, 65, 128])
def test_ranks(kind, R, dtype, device):
    check(Case(M=37, K=70, N=53, R=R, p=0.1, dtype=dtype, device=device, quant_type=kind.quant_type))


@every_dtype
@pytest.mark.parametrize("shape", [(), (9,), (3, 4), (2, 3, 4), (3, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides(kind, shape, strided, dtype, device):
    check(Case(M=shape, p=0.2, dtype=dtype, strided=strided, device=device, quant_type=kind.quant_type))


ADAPTERS = [
    pytest.param(kind, dtype, adapter, id=f"{kind}-{dtype}-{adapter}")
    for kind in KINDS
    for dtype, adapter in ((BF16, FP32), (FP16, FP32), (FP32, BF16), (BF16, FP16), (BF16, FP64), (FP16, FP64))
    if adapter in kind.dtypes
]


@pytest.mark.parametrize(("kind", "dtype", "adapter"), ADAPTERS, indirect=["kind"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [8, 129])
def test_adapters_of_another_dtype(kind, M, p, adapter, dtype, device):
    check(Case(M=M, K=128, N=67, R=8, p=p, dtype=dtype, adapter_dtype=adapter, device=device, quant_type=kind.quant_type))


@every_needs()
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_combination_of_gradients(kind, needs, p, device):
    check(Case(p=p, needs=needs, device=device, quant_type=kind.quant_type))


@every_needs()
@pytest.mark.parametrize("R", [8, 80])
def test_only_what_a_gradient_reads_is_handed_over(kind, needs, R, device):
    """And only the wanted gradients come back."""
    dtype = FP16
    check_contract(
        Case(M=40, K=64, N=56, R=R, p=0.3, dtype=dtype, needs=needs, device=device, quant_type=kind.quant_type).draw()
    )


@every_dense_kind
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_trained_weight_in_16_bit(kind, dtype, device):
    check(Case(M=65, K=66, N=67, p=0.3, needs=("x", "W", "A"), dtype=dtype, device=device))


@every_kind
@pytest.mark.parametrize("scaling", [0, 1, 0.125, -3.0, torch.tensor(1.7), torch.tensor(0.3, dtype=FP64)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_scaling(kind, scaling, dtype, device):
    check(Case(p=0.1, scaling=scaling, dtype=dtype, quant_type=kind.quant_type, device=device))
    if isinstance(scaling, torch.Tensor):
        check(Case(p=0.1, scaling=scaling.to(device), dtype=dtype, quant_type=kind.quant_type, device=device))


@every_kind
@pytest.mark.parametrize("narrow", [BF16, FP16])
@pytest.mark.parametrize("base", [FP32, BF16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_autocast(kind, p, base, narrow, device):
    """fp32 x and adapters; the output and the base product have autocast's dtype, gradients their parameter's."""

    def compute(problem):
        if base != FP32 and kind.quant_type is None:
            problem.W.data = problem.W.data.to(base).to(FP32)  # the same values, read through the narrow dtype
        found = ours(problem)
        assert found["y"].dtype == narrow
        assert all(found[f"d{name}"].dtype == leaf.dtype for name, leaf in problem.leaves.items())
        return found

    case = Case(M=65, K=64, N=45, p=p, autocast=narrow, device=device, quant_type=kind.quant_type, base_dtype=base)
    if base == FP32 or kind.quant_type is not None:
        check(case, compute)
    else:
        problem = case.draw()
        narrow_base = lora_linear_under(case, problem, problem.W.to(base))
        assert torch.equal(narrow_base, lora_linear_under(case, problem, problem.W.to(base).float()))


def lora_linear_under(case, problem, W):
    with torch.autocast(problem.x.device.type, case.autocast):
        return lora_linear(problem.x, W, problem.A, problem.B, problem.c, dropout_p=case.p, seed=1)


def test_autocast_leaves_float64_alone(device):
    problem = Case(dtype=FP64, device=device).draw()
    with torch.autocast(device.type, BF16), use_backend("torch"):
        assert lora_linear(*problem.inputs.values()).dtype == FP64


RANDOM = {
    "M": st.integers(0, 70),
    "K": st.integers(1, 200),
    "N": st.integers(1, 90),
    "R": st.integers(1, 40),
    "p": st.sampled_from([0.0, 0.05, 0.5, 0.97]),
    "scaling": st.floats(-4, 4, allow_subnormal=False),
    "bias": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "needs": st.sets(st.sampled_from("xWABc"), min_size=1).map(tuple),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "strided": st.booleans(),
}
FORMATS = {
    "quant_type": st.sampled_from([None, "nf4", "fp4"]),
    "blocksize": st.sampled_from(BLOCKSIZES),
    "double_quant": st.booleans(),
    "base_dtype": st.sampled_from([BF16, FP32]),
}


@settings(max_examples=120, deadline=None)
@given(st.builds(Case, **RANDOM, **FORMATS))
def test_random_options(device, case):
    case.device = device
    with use_backend("torch"):
        check(case)


@settings(max_examples=15, deadline=None)
@given(st.builds(Case, **{**RANDOM, **FORMATS, "dtype": st.sampled_from(DTYPES[:3])}))
def test_random_options_of_the_kernels(device, case):
    case.device = device
    with use_backend("triton"):
        check(case)


@every_kind
def test_dropping_everything_is_the_base_layer(kind, device):
    problem = Case(p=1.0, device=device, quant_type=kind.quant_type, M=40).draw()
    found = contract(problem)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert not any(found[name].any() for name in ("h", "dA", "dB"))
    check_contract(problem, {name: found[name] for name in ("y", "dx", "dc")})


@every_kind
def test_reruns_are_bit_identical(kind, device):
    problem = Case(M=129, K=600, N=264, R=12, p=0.2, dtype=BF16, device=device, quant_type=kind.quant_type).draw()
    first, second = contract(problem), contract(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_kind
@pytest.mark.parametrize("R", [8, 80])
def test_views(kind, R, device):
    """Row-strided, transposed, shifted and expanded tensors give what their contiguous copies give."""
    problem = Case(M=40, K=48, N=56, R=R, p=0.3, dtype=FP16, device=device, quant_type=kind.quant_type).draw()
    want = contract(problem)
    x, A, B, c, dy = (getattr(problem, name).detach() for name in ("x", "A", "B", "c", "dy"))
    views = [
        (x.T.contiguous().T, A.T.contiguous().T, B.T.contiguous().T, torch.stack([c, c], 1)[:, 0]),
        (torch.cat([x, x, x], 1)[:, 48:96], torch.cat([A, A], 1)[:, 48:], torch.cat([B, B], 1)[:, R:], c),
        (torch.stack([x, x], 1)[:, 1], A, B, c),
    ]
    names = ("x", "A", "B", "c")
    for view in views:
        tensors = {name: t.requires_grad_() for name, t in zip(names, view, strict=True)}
        for other in (torch.cat([dy, dy], 1)[:, 56:], dy.T.contiguous().T):
            got = contract(replace(problem, dy=other, **tensors))
            # which order a vendor sums in may follow the layout; the package's own kernels are handed contiguous rows
            exactly = kind.backend not in ("torch", "cpu") and R <= 64
            assert all(torch.equal(got[n], want[n]) if exactly else torch.allclose(got[n], want[n], 1e-2, 1e-2) for n in want)
    for shape in ((1, 1), (1, 56)):
        expanded = replace(problem, dy=dy[: shape[0], : shape[1]].expand(40, 56))
        check_contract(expanded)
