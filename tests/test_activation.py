"""a = act(e)·u and its gradients, by csrc/cpu and by PyTorch operations, against float64."""

import itertools
from types import ModuleType

import pytest
import torch
from accuracy import nan_in_fresh_memory
from cpu_extension_build import compiled
from torch import Tensor

from lora_kernels import cpu_extension
from lora_kernels.backends.torch import activation
from lora_kernels.backends.torch.activation import ACTIVATIONS, gated, gated_backward
from lora_kernels.cases.rule import violations
from lora_kernels.reference.activation import act, act_derivative

NARROW = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 63), (2, 64), (5, 65), (7, 200), (2, 4100), (0, 5), (4, 0)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return compiled(tmp_path_factory.mktemp("right"))


@pytest.fixture(params=["csrc", "operations"])
def way(request: pytest.FixtureRequest, built: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that every call takes."""
    monkeypatch.setattr(cpu_extension, "extension", built if request.param == "csrc" else None)
    monkeypatch.setattr(activation, "row_chunks", lambda M, width, device: [slice(0, M // 2), slice(M // 2, M)])


def draw(size: tuple[int, int], dtype: torch.dtype, gate: bool = True) -> list[Tensor | None]:
    """da, e and u; e in every part of the functions."""
    generator = torch.Generator().manual_seed(size[0] + 17 * size[1])
    da, e, u = (torch.randn(size, generator=generator) * scale for scale in (1.0, 4.0, 2.0))
    return [da.to(dtype), e.to(dtype) if gate else None, u.to(dtype)]


def results(da: Tensor, e: Tensor | None, u: Tensor, name: str) -> dict[str, Tensor]:
    """a, de and du."""
    with nan_in_fresh_memory():
        a = gated(e, u, name)
        du, de = torch.empty_like(u), None if e is None else torch.empty_like(u)
        gated_backward(da, e, u, name, de, du)
    return {"a": a, "du": du} | ({} if de is None else {"de": de})


def by_operations(da: Tensor, e: Tensor | None, u: Tensor, name: str) -> dict[str, Tensor]:
    """PyTorch's own, in the dtype of u: the composition that users write, and autograd."""
    leaves = [t.detach().requires_grad_() for t in (u, e) if t is not None]
    a = act(leaves[-1], name) if e is None else act(leaves[1], name) * leaves[0]
    return {"a": a.detach()} | dict(zip(("du", "de"), torch.autograd.grad(a, leaves, da), strict=False))


def truth(da: Tensor, e: Tensor | None, u: Tensor, name: str) -> dict[str, Tensor]:
    da, u = da.double(), u.double()
    if e is None:
        return {"a": act(u, name), "du": da * act_derivative(u, name)}
    e = e.double()
    return {"a": act(e, name) * u, "du": da * act(e, name), "de": da * u * act_derivative(e, name)}


def broken(tensors: list[Tensor | None], name: str) -> list[str]:
    return violations(results(*tensors, name), by_operations(*tensors, name), truth(*tensors, name), tensors[2].dtype)


@pytest.mark.parametrize("gate", [True, False], ids=["gate", "plain"])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sizes(way, name, dtype, gate):
    for size in SIZES:
        tensors = draw(size, dtype, gate)
        before = [None if t is None else t.clone() for t in tensors]
        assert not (found := broken(tensors, name)), (size, found)
        assert all(t is None or torch.equal(t, b) for t, b in zip(tensors, before, strict=True)), "an input was written to"


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_in_da_s_own_memory(way, name, dtype):
    da, e, u = draw((2, 5000), dtype)  # rows in two parts: neither reads what the other has written
    want = results(da, e, u, name)
    for place in ("de", "du"):
        other, own = torch.empty_like(u), da.clone()
        de, du = (own, other) if place == "de" else (other, own)
        gated_backward(own, e, u, name, de, du)
        assert torch.equal(de, want["de"])
        assert torch.equal(du, want["du"])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_wider_da(way, name):
    """da of float32 beside e and u of bfloat16, and a gradient in either dtype."""
    _, e, u = draw((6, 130), torch.bfloat16)
    da = draw((6, 130), torch.float32)[0]
    de, du = torch.empty_like(da), torch.empty_like(u)
    gated_backward(da, e, u, name, de, du)
    wide = results(da, e.float(), u.float(), name)
    assert torch.equal(de, wide["de"])
    assert torch.equal(du, wide["du"].bfloat16())


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_that_lie_apart(way, dtype):
    """Rows with a gap, columns that are not adjacent, and memory for the result."""
    da, e, u = draw((6, 130), dtype)
    want = results(da, e, u, "silu")
    spread = [torch.full((6, 140), 7.0, dtype=dtype)[:, 3:133].copy_(t) for t in (da, e, u)]
    turned = [t.T.contiguous().T for t in (da, e, u)]
    for tensors in (spread, turned, [da, spread[1], turned[2]]):
        whole = torch.full((6, 150), 5.0, dtype=dtype)
        out = whole[:, 4:134]
        assert gated(*tensors[1:], "silu", out) is out
        torch.testing.assert_close(out, want["a"])  # PyTorch rounds otherwise where elements are not adjacent
        gated_backward(*tensors, "silu", torch.empty_like(da), out)
        torch.testing.assert_close(out, want["du"])
        assert (whole[:, :4] == 5).all()
        assert (whole[:, 134:] == 5).all()


def finite(size: int) -> Tensor:
    """Both signs, from subnormals to the largest: every power of two and numbers between."""
    steps = torch.tensor([1.0, 1.25, 1.9])[:, None] * 2.0 ** torch.arange(-149, 128).double()
    fine = torch.linspace(-110, 110, size).double()
    return torch.cat([steps.flatten(), -steps.flatten(), fine, torch.zeros(1), -torch.zeros(1)]).float()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_magnitude(built, monkeypatch, name):
    """Each element of csrc's result by itself, where PyTorch's own operations are worse by no more than a unit of 1."""
    monkeypatch.setattr(cpu_extension, "extension", built)
    v, eps = finite(20001)[None], torch.finfo(torch.float32).eps
    one = torch.ones_like(v)
    du = torch.empty_like(v)
    gated_backward(one, None, v, name, None, du)
    for got, exact in ((gated(None, v, name), act(v.double(), name)), (du, act_derivative(v.double(), name))):
        usual = (exact.abs() < 1e38) & (v.abs() < 1e15)  # beyond, v³ is no float
        error = (got - exact).abs()[usual]
        assert (error <= 4 * eps * (exact.abs()[usual] + v.abs()[usual].clamp(max=1)) + 2.0**-148).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_finite(built, monkeypatch, name, dtype):
    """NaN where PyTorch's operations have it, and infinities of the same sign.

    Each is computed alone: with AVX512 PyTorch's gelu of several elements is NaN for inf.
    """
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 3e4, -3e4])
    da, e, u = (
        torch.tensor(column).to(dtype)[None] for column in zip(*itertools.product(special.tolist(), repeat=3), strict=True)
    )
    monkeypatch.setattr(cpu_extension, "extension", built)
    found = results(da, e, u, name)
    monkeypatch.setattr(cpu_extension, "extension", None)
    wanted = [results(*(t[:, i : i + 1] for t in (da, e, u)), name) for i in range(e.shape[1])]
    for key, got in found.items():
        want = torch.cat([result[key] for result in wanted], dim=1)
        assert torch.equal(got.isnan(), want.isnan()), key
        assert torch.equal(got[got.isinf()], want[want.isinf()]), key


def test_16_bit_values_are_read_as_they_are(built, monkeypatch):
    """Every number of both types; relu2 of a kept one is its square, rounded once."""
    monkeypatch.setattr(cpu_extension, "extension", built)
    for dtype in (torch.bfloat16, torch.float16):
        v = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
        one = torch.ones_like(v)
        ours, want = gated(one, v, "relu2"), v
        assert torch.equal(ours.isnan(), want.isnan())
        assert torch.equal(ours.nan_to_num(0.0), want.nan_to_num(0.0))


def test_threads_change_no_bit(built, monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", built)
    tensors, before, found = draw((9, 5000), torch.float32), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(results(*tensors, "gelu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))


def test_compiled(built, monkeypatch):
    """Traced, it is PyTorch's operations."""
    monkeypatch.setattr(cpu_extension, "extension", built)

    def both(da: Tensor, e: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        de, du = torch.empty_like(u), torch.empty_like(u)
        gated_backward(da, e, u, "gelu_tanh", de, du)
        return gated(e, u, "gelu_tanh"), de, du

    tensors = draw((5, 70), torch.float32)
    for got, want in zip(torch.compile(both, fullgraph=True, backend="eager")(*tensors), both(*tensors), strict=True):
        torch.testing.assert_close(got, want)


def test_unknown(built):
    rows = 0, 0, "float32"
    with pytest.raises(ValueError, match="activation: got swish, expected silu, gelu, gelu_tanh or relu2"):
        built.glu_forward("swish", 0, 0, rows, None, rows, 1)
    with pytest.raises(ValueError, match="activation: got swish"):
        built.glu_backward("swish", 0, 0, rows, None, rows, None, rows, 1)
    with pytest.raises(ValueError, match="Rows: got dtype int8, expected float32"):
        built.glu_forward("silu", 0, 0, (0, 0, "int8"), None, rows, 1)


# ---- mistakes ----

MISTAKES = {
    "e and u swapped": ("glu.cpp", "e[i] = a[i] * u[i] * slope", "e[i] = a[i] * e[i] * slope"),
    "the slope for the value": ("glu.cpp", "u[i] = a[i] * act;", "u[i] = a[i] * std::max(act, slope);"),
    "a plain MLP's value for its slope": ("glu.cpp", "u[i] = a[i] * slope;\n      }\n    }", "u[i] *= a[i];\n      }\n    }"),
    "a term of silu's slope": ("glu.cpp", "slope = of.s * (1.0f + v * of.rest)", "slope = of.s"),
    "gelu's density": ("glu.cpp", "0.398942280f * exponential(-0.5f", "0.398942280f * exponential(-0.45f"),
    "gelu_tanh's cube": ("glu.cpp", "(TWO_BETA * (1.0f + 3.0f * KAPPA", "(TWO_BETA * (1.0f + 2.0f * KAPPA"),
    "what a sigmoid leaves": ("glu.cpp", "rest = v > 0.0f ? t * s : 1.0f - s", "rest = 1.0f - s * s"),
    "relu2's slope": ("glu.cpp", "slope = 2.0f * kept", "slope = kept"),
    "a coefficient of exp": ("glu.cpp", "p * r + 1.6666665459e-1f", "p * r + 1.6676665459e-1f"),
    "the upper half of erf": ("glu.cpp", "z < 0.0f ? tail : 1.0f - tail", "z < 0.0f ? tail : 1.0f"),
    "the last tile": ("glu.cpp", "TILE, last - first);\n    read(u, t.u", "TILE - 1, last - first);\n    read(u, t.u"),
    "the next row": ("glu.cpp", "part(t, i / per_row,", "part(t, i / per_row / 2,"),
    "the next segment": ("glu.cpp", "i % per_row * SEGMENT", "i % per_row * (SEGMENT + 1)"),
    "bfloat16 is cut off": ("numbers.h", "(bits + 0x7FFF + (bits >> 16 & 1)) >> 16", "bits >> 16"),
    "half's ties": ("numbers.h", "(magnitude + 0xFFF + (magnitude >> 13 & 1)", "(magnitude + 0x1FFF"),
    "half's exponent": ("numbers.h", "* 0x1p112f", "* 0x1p111f"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path, MISTAKES[mistake]))
    draws = itertools.product(ACTIVATIONS, [(3, 4103), (7, 200)], NARROW, (True, False))
    assert any(broken(draw(size, dtype, gate), name) for name, size, dtype, gate in draws)
