"""The activation between the products of experts: every backend by the one rule, who computes it, mistakes."""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import nan_in_fresh_memory
from test_activation import act, act_derivative
from torch import Tensor
from triton_interpreter import DEVICE

from lora_kernels import cpu_extension, use_backend
from lora_kernels.backends.triton import activation as kernels
from lora_kernels.backends.triton.kernels import glu, glu_backward
from lora_kernels.cases.rule import violations
from lora_kernels.functional.experts import gated_activation
from lora_kernels.values import ACTIVATIONS

KINDS = [*((name, dtype) for name in ACTIVATIONS for dtype in (torch.float32, torch.bfloat16)), ("silu", torch.float16)]
SIZES = [(1, 1), (3, 7), (35, 65), (2, 300)]
has_gate = pytest.mark.parametrize("has_gate", [True, False], ids=["gated", "plain"])


def drawn(M: int, I: int, dtype: torch.dtype, has_gate: bool) -> tuple[Tensor, Tensor]:  # noqa: E741
    """(h, da)."""
    return torch.randn(M, (1 + has_gate) * I).to(DEVICE, dtype), torch.randn(M, I).to(DEVICE, dtype)


def results(h: Tensor, da: Tensor, name: str, has_gate: bool) -> dict[str, Tensor]:
    leaf = h.detach().requires_grad_()
    with nan_in_fresh_memory():
        a = gated_activation(leaf, name, has_gate)
        (dh,) = torch.autograd.grad(a, leaf, da)
    return {"a": a.detach(), "dh": dh}


def by_operations(h: Tensor, da: Tensor, name: str, has_gate: bool) -> dict[str, Tensor]:
    leaf = h.detach().requires_grad_()
    e, u = leaf.chunk(2, 1) if has_gate else (leaf, 1)
    a = act(e, name) * u
    return {"a": a.detach(), "dh": torch.autograd.grad(a, leaf, da)[0]}


def truth(h: Tensor, da: Tensor, name: str, has_gate: bool) -> dict[str, Tensor]:
    h, da = h.double(), da.double()
    if not has_gate:
        return {"a": act(h, name), "dh": da * act_derivative(h, name)}
    e, u = h.chunk(2, 1)
    return {"a": act(e, name) * u, "dh": torch.cat([da * u * act_derivative(e, name), da * act(e, name)], 1)}


def broken(h: Tensor, da: Tensor, name: str = "silu", has_gate: bool = True) -> list[str]:
    options = name, has_gate
    return violations(results(h, da, *options), by_operations(h, da, *options), truth(h, da, *options), h.dtype)


@has_gate
@pytest.mark.parametrize(("name", "dtype"), KINDS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_sizes(backend, name, dtype, has_gate):
    with use_backend(backend):
        for M, I in SIZES:  # noqa: E741
            h, da = drawn(M, I, dtype, has_gate)
            before = h.clone(), da.clone()
            assert not (found := broken(h, da, name, has_gate)), (M, I, found)
            assert torch.equal(h, before[0])
            assert torch.equal(da, before[1]), "da may be another's too"


@has_gate
def test_other_layouts_dtypes_and_no_rows(has_gate):
    """Gradients that are expanded or lie apart, float64, M = 0: those that kernels do not take are PyTorch's."""
    with use_backend("triton"):
        h, da = drawn(17, 40, torch.float32, has_gate)
        assert not broken(h, da.T.contiguous().T, "silu", has_gate)
        assert not broken(h, da[:1, :1].expand(17, 40), "silu", has_gate)
        assert not broken(h.double(), da.double(), "silu", has_gate)
        empty = results(h[:0], da[:0], "silu", has_gate)
        assert empty["a"].shape == (0, 40)
        assert empty["dh"].shape == h[:0].shape


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, *names: str) -> list[str]:
    calls: list[str] = []
    for name in names:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, f=function, n=name: calls.append(n) or f(*args))
    return calls


@has_gate
def test_the_kernels_are_launched(monkeypatch, has_gate):
    calls = counted(monkeypatch, kernels, "glu", "glu_backward")
    with use_backend("triton"):
        results(*drawn(5, 8, torch.bfloat16, has_gate), "silu", has_gate)
    assert calls == ["glu", "glu_backward"]


@has_gate
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has kernels of its own")
def test_a_cpu_has_its_loops(monkeypatch, has_gate):
    """csrc/cpu reads e and u where they lie."""
    if cpu_extension.extension is None:
        pytest.skip(cpu_extension.why_not)
    calls: list[str] = []

    class Counting:
        def __getattr__(self, name: str):
            calls.append(name)
            return getattr(built, name)

    built = cpu_extension.extension
    monkeypatch.setattr(cpu_extension, "extension", Counting())
    with use_backend("auto"):
        assert not broken(*drawn(5, 8, torch.float32, has_gate), "silu", has_gate)
    assert calls == ["glu_forward", "glu_backward"]


def test_a_gpu_on_which_kernels_do_not_compile(monkeypatch):
    """With "auto" PyTorch computes from then on; a request by name raises."""
    monkeypatch.setattr(kernels, "why_not", lambda h: None)
    monkeypatch.setattr(kernels, "glu", lambda *args: (_ for _ in ()).throw(RuntimeError("PassManager::run failed")))
    monkeypatch.setattr(kernels, "glu_backward", kernels.glu)
    given_up: list[str] = []
    monkeypatch.setattr(kernels, "give_up", lambda device, error, setting: given_up.append(setting))
    with use_backend("auto"):
        assert not broken(*drawn(5, 8, torch.float32, True))
    assert given_up == ["auto", "auto"]


# ---- mistakes ----


@triton.jit
def act_of_the_other(e, u, ACT: tl.constexpr):
    return right_gated(u, e, ACT)


@triton.jit
def rows_without_gaps(p, o_row, o_column, stride, rows, columns):
    return right_load_tile(p, o_row, o_column, columns, rows, columns)


@triton.jit
def slope_of_the_value(v, gate, act, ACT: tl.constexpr):
    return act


right_gated, right_load_tile, right_backward = glu.gated, glu.load_tile, kernels.glu_backward


def halves_exchanged(da, e, u, *rest):
    found = right_backward(da, e, u, *rest)
    rest[-1].copy_(rest[-1].roll(u.shape[1], 1))
    return found


MUTANTS = [
    (glu, "gated", act_of_the_other),
    (glu, "load_tile", rows_without_gaps),
    (glu_backward, "slope_of", slope_of_the_value),
    (kernels, "glu_backward", halves_exchanged),
]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
@pytest.mark.parametrize(("module", "name", "mutant"), MUTANTS)
def test_a_mistake_is_caught(module, name, mutant, monkeypatch):
    h, da = drawn(17, 40, torch.float16, True)
    with use_backend("triton"):
        assert not broken(h, da)
        monkeypatch.setattr(module, name, mutant)
        assert broken(h, da)
