"""eggroll_linear and eggroll_gradient against float64, in every dtype and backend; the normal values; mistakes; errors."""

import math
from statistics import NormalDist

import pytest
import torch
from kinds import DTYPES, KINDS

from lora_kernels import eggroll_gradient, eggroll_linear, plan, quantize_nf4
from lora_kernels.backends.torch import eggroll as pytorch
from lora_kernels.cases.rule import violations
from lora_kernels.normal import normals, table
from lora_kernels.reference import eggroll as reference

BF16, FP16, FP32, FP64 = DTYPES
SIGMA, SEED, OFFSET = 0.3, -(7**20), 3
OWN = [kind for kind in KINDS if kind.backend != "cuda"]
every_dtype = pytest.mark.parametrize(("kind", "dtype"), [(k, d) for k in OWN for d in k.dtypes], ids=str, indirect=["kind"])
SIZES = [(2, 1, 1, 1, 1), (4, 3, 33, 70, 1), (6, 17, 24, 136, 5), (16, 1, 300, 9, 2)]  # P, M, N, K, r
BASE = {"population": 4, "sigma": SIGMA, "rank": 2, "seed": SEED, "offset": OFFSET}


def draw(rows, N, K, dtype, device, quant_type=None):
    """(x, W, c) whose gaps are NaN."""
    memory = torch.full((rows, 2 * K), torch.nan, dtype=dtype, device=device)
    x = memory[:, :K].copy_(torch.randn(rows, K))
    W, c = torch.randn(N, K, device=device), torch.randn(N, device=device).to(dtype)
    return x, quantize_nf4(W) if quant_type else W.to(dtype), c


def broken(x, W, c, P, r, dtype, **others) -> list[str]:
    y = eggroll_linear(x, W, c, population=P, sigma=SIGMA, rank=r, seed=SEED, offset=OFFSET, **others)
    assert y.dtype == dtype
    dense, seed = W if isinstance(W, torch.Tensor) else W.dequantize(dtype), torch.tensor(SEED, device=x.device)
    plain = reference.forward(x.contiguous(), dense, c, P, SIGMA, r, seed, OFFSET)
    wide = None if c is None else c.double()
    exact = reference.forward(x.double().contiguous(), dense.double(), wide, P, SIGMA, r, seed, OFFSET)
    return violations({"y": y}, {"y": plain}, {"y": exact}, dtype)


@every_dtype
@pytest.mark.parametrize(("P", "M", "N", "K", "r"), SIZES)
def test_rows(kind, dtype, P, M, N, K, r, device):
    x, W, c = draw(P * M, N, K, dtype, device, kind.quant_type)
    assert not (lines := broken(x, W, c if r > 1 else None, P, r, dtype)), lines


@pytest.mark.parametrize("kind", OWN, ids=str, indirect=True)
@pytest.mark.parametrize("dtype", [FP32, FP64])
@pytest.mark.parametrize(("P", "r", "N", "K"), [(2, 1, 1, 1), (6, 3, 40, 70), (130, 1, 65, 33)])
def test_gradient(kind, dtype, P, r, N, K, device):
    f, seed = torch.randn(P, dtype=dtype, device=device), torch.tensor(SEED, device=device)
    dW = eggroll_gradient(f, (N, K), sigma=SIGMA, rank=r, seed=SEED, offset=OFFSET)
    assert dW.dtype == dtype
    plain, exact = (reference.gradient(t, N, K, SIGMA, r, seed, OFFSET) for t in (f, f.double()))
    assert not (lines := violations({"dW": dW}, {"dW": plain}, {"dW": exact}, dtype)), lines


def test_the_specification(device):
    """Member by member with dense perturbations, without the reference."""
    P, M, N, K, r = 4, 3, 5, 7, 2
    x, W, c = draw(P * M, N, K, FP64, device)
    y, f = eggroll_linear(x, W, c, **BASE), torch.randn(P, dtype=FP64, device=device)
    A, B = (normals(slice(0, P // 2 * r), n, torch.tensor(SEED, device=device), 2 * OFFSET + i) for i, n in enumerate((K, N)))
    dW = torch.zeros_like(W)
    for i in range(P):
        rows, sign = slice(i // 2 * r, i // 2 * r + r), 1 - 2 * (i % 2)
        E = sign / math.sqrt(r) * B[rows].double().T @ A[rows].double()
        torch.testing.assert_close(y[i * M : (i + 1) * M], x[i * M : (i + 1) * M] @ (W + SIGMA * E).T + c)
        dW += f[i] * E / (P * SIGMA)
    torch.testing.assert_close(eggroll_gradient(f, (N, K), sigma=SIGMA, rank=r, seed=SEED, offset=OFFSET), dW)


@pytest.mark.parametrize("kind", OWN[:3:2], ids=str, indirect=True)
def test_the_same_bits_again_and_other_ones_of_another_seed_or_offset(kind, device):
    x, W, c = draw(8, 40, 70, FP32, device)
    first = eggroll_linear(x, W, c, **BASE)
    assert torch.equal(first, eggroll_linear(x, W, c, **{**BASE, "seed": torch.tensor(SEED, device=device)}))
    for other in ({"seed": SEED + 1}, {"offset": OFFSET + 1}, {"offset": OFFSET + (1 << 40)}):
        assert not torch.allclose(first, eggroll_linear(x, W, c, **{**BASE, **other}))


def test_chunks_of_pairs(monkeypatch, device):
    x, W, c = draw(40, 24, 32, FP32, device)
    whole = eggroll_linear(x, W, c, **{**BASE, "population": 20}), eggroll_gradient(x[:20, 0], (24, 32), sigma=1.0, seed=1)
    monkeypatch.setattr(pytorch, "DRAWN", 300)
    parts = eggroll_linear(x, W, c, **{**BASE, "population": 20}), eggroll_gradient(x[:20, 0], (24, 32), sigma=1.0, seed=1)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_shapes_empty_rows_and_autocast(device):
    x, W, c = draw(24, 5, 6, FP32, device)
    flat = eggroll_linear(x, W, c, **BASE)
    assert torch.equal(eggroll_linear(x.view(4, 2, 3, 6), W, c, **BASE), flat.view(4, 2, 3, 5))
    assert eggroll_linear(x[:0], W, c, **BASE).shape == (0, 5)
    assert eggroll_linear(x[:, :0], W[:, :0], c, **BASE).shape == (24, 5)
    assert eggroll_gradient(torch.ones(2, device=device), (0, 3), sigma=1.0, seed=1).shape == (0, 3)
    with torch.autocast(device.type, BF16):
        assert torch.equal(eggroll_linear(x, W, c, **BASE), eggroll_linear(x.bfloat16(), W.bfloat16(), c.bfloat16(), **BASE))
    x.requires_grad_()
    assert not eggroll_linear(x, W, c, **BASE).requires_grad


# ---- normal values ----


def test_the_table_is_the_normal_distribution_of_65536_values():
    values = table(torch.device("cpu")).double()
    assert values.mean() == 0
    assert values.square().mean() == pytest.approx(1, abs=1e-7)
    assert values.pow(4).mean() == pytest.approx(3, abs=2e-3)
    assert torch.equal(values.sort().values, values)
    assert torch.equal(values.flip(0), -values)
    assert values[40000].item() == pytest.approx(NormalDist().inv_cdf(40000.5 / 65536), rel=1e-4)


def test_normal_values_are_independent(device):
    values = normals(slice(0, 512), 1000, torch.tensor(1, device=device)).double()
    error = values.numel() ** -0.5
    assert abs(values.mean()) < 4 * error
    assert abs(values.square().mean() - 1) < 6 * error
    for other in (normals(slice(0, 512), 1000, torch.tensor(1, device=device), 1), values.roll(1, 0), values.roll(1, 1)):
        assert abs((values * other).mean()) < 4 * error
    part = normals(slice(100, 103), 17, torch.tensor(1, device=device))
    assert torch.equal(part.double(), values[100:103, :17])


def test_the_estimate_is_the_gradient_within_its_standard_error(device):
    """Of a fitness that is linear in W, whose gradient smoothing does not change: mean and spread over many draws."""
    N, K, P, r = 4, 6, 64, 2
    G = torch.randn(N, K, dtype=FP64, device=device)
    x, estimates = torch.eye(K, dtype=FP64, device=device).repeat(P, 1), []
    for seed in range(200):
        y = eggroll_linear(x, torch.zeros_like(G), None, population=P, sigma=SIGMA, rank=r, seed=seed)  # W's columns of each
        f = torch.einsum("pkn,nk->p", y.view(P, K, N), G)
        estimates.append(eggroll_gradient(f, (N, K), sigma=SIGMA, rank=r, seed=seed))
    stack = torch.stack(estimates)
    error = stack.std(0) / len(stack) ** 0.5
    assert ((stack.mean(0) - G).abs() < 4.5 * error).all()
    assert (error < 0.25 * G.norm()).all()


# ---- mistakes ----


def without_signs(*arguments):
    x, W, c, P, *rest = arguments
    y = pytorch_forward(*arguments)
    M = len(x) // P
    y.view(P // 2, 2, M, -1)[:, 1] = pytorch_forward(x.view(P // 2, 2, M, -1).flip(1).reshape(x.shape), W, c, P, *rest).view(
        P // 2, 2, M, -1
    )[:, 0]
    return y


pytorch_forward = pytorch.forward
MISTAKES = {
    "both of a pair are perturbed alike": without_signs,
    "the rank is not in the scale": lambda x, W, c, P, s, r, *rest: pytorch_forward(x, W, c, P, s * r**0.5, r, *rest),
    "offsets are swapped": lambda *arguments: pytorch_forward(*arguments[:-1], arguments[-1] + 1),
    "the bias is perturbed": lambda x, W, c, P, s, *rest: pytorch_forward(x, W, c * (1 + s), P, s, *rest),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake, monkeypatch):
    x, W, c = draw(12, 24, 40, FP32, torch.device("cpu"))
    with plan.use_backend("torch"):
        assert not broken(x, W, c, 4, 3, FP32)
        monkeypatch.setattr(pytorch, "forward", MISTAKES[mistake])
        assert broken(x, W, c, 4, 3, FP32)


# ---- errors ----

X, W = torch.ones(8, 6), torch.ones(5, 6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"population": 3}, ValueError, "population: got 3, expected an even number"),
        ({"population": 0}, ValueError, "population: got 0, expected at least 2"),
        ({"population": 6}, ValueError, "x: got 8 rows, expected a multiple of population=6"),
        ({"population": 2.0}, TypeError, "population: got float, expected an int"),
        ({"population": 1 << 31, "rank": 2}, ValueError, "expected fewer than 2\\^31 rows of factors"),
        ({"rank": 0}, ValueError, "rank: got 0, expected at least 1"),
        ({"offset": -1}, ValueError, "offset: got -1, expected at least 0"),
        ({"offset": 1 << 63}, ValueError, "offset: got .*, expected it below 2\\^63"),
        ({"sigma": 0.0}, ValueError, "sigma: got 0.0, expected a positive number"),
        ({"sigma": float("inf")}, ValueError, "sigma: got inf"),
        ({"sigma": "1"}, TypeError, "sigma: got str, expected a float"),
        ({"seed": None}, TypeError, "seed: got NoneType"),
        ({"weight": W.T}, ValueError, r"x: got shape \(8, 6\), expected \[\.\.\., 5\]"),
        ({"weight": W.double()}, TypeError, "x: got dtype torch.float32, expected torch.float64 as weight"),
        ({"bias": torch.ones(6)}, ValueError, r"bias: got shape \(6,\), expected \(5,\)"),
    ],
)
def test_errors_of_the_layer(change, error, words):
    with pytest.raises(error, match=words):
        eggroll_linear(**{"x": X, "weight": W, "bias": None, **BASE, **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fitness": [1.0, 2.0]}, TypeError, "fitness: got list, expected a tensor of floats"),
        ({"fitness": torch.ones(4, dtype=torch.int64)}, TypeError, "fitness: got torch.int64"),
        ({"fitness": torch.ones(4, 1)}, ValueError, r"fitness: got shape \(4, 1\), expected \[P\]"),
        ({"fitness": torch.ones(3)}, ValueError, "population: got 3, expected an even number"),
        ({"shape": (5,)}, ValueError, r"shape: got \(5,\), expected \(N, K\)"),
    ],
)
def test_errors_of_the_gradient(change, error, words):
    with pytest.raises(error, match=words):
        eggroll_gradient(**{"fitness": torch.ones(4), "shape": (5, 6), "sigma": 1.0, "seed": 1, **change})
