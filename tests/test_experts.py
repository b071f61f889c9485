"""Experts by lora_grouped_linear: transformers' experts implementation "lora_kernels", absent experts, mistakes."""

import pytest
import torch
from accuracy import nan_in_fresh_memory
from experts_case import HIDDEN, INNER, MODELS, E, by_sums, drawn, fast, layer, moe, results, run

from lora_kernels import register_experts
from lora_kernels.cases.rule import violations
from lora_kernels.functional.experts import _Copies
from lora_kernels.layers import experts as ours


@pytest.mark.parametrize("name", MODELS)
def test_the_implementation_computes_whole_models(name):
    """Weights and biases of the experts are trained too."""
    register_experts()
    model = moe(name)
    exact = run(moe(name).double())
    model.set_experts_implementation("lora_kernels")
    with nan_in_fresh_memory():
        tested = run(model)
    assert sum("experts." in path for path in tested) >= 2
    for path, value in exact.items():
        assert (tested[path] - value).abs().max() <= 2e-5 * value.abs().max() + 1e-7, path


def broken(compute, dtype=torch.float32, activation="silu"):
    module, tensors = layer(dtype, activation), drawn(dtype)
    with nan_in_fresh_memory():
        tested = results(module, tensors, compute)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    exact = results(layer(dtype, activation).double(), wide, by_sums)
    return violations(tested, results(module, tensors, by_sums), exact, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_layer(dtype, activation):
    """By the one rule; quick_gelu is not fused, and an expert has no rows."""
    assert not broken(fast, dtype, activation)


@pytest.mark.parametrize("absent", [E, -1, E + 3])
def test_an_absent_expert_adds_zeros(absent):
    """Its slots have a router weight that is 0 or not, as expert parallelism leaves them."""
    module, (x, ids, weights, dy, *factors) = layer(torch.float32), drawn(torch.float32)
    ids[::2, 1] = absent
    with nan_in_fresh_memory():
        tested = results(module, [x, ids, weights, dy, *factors], fast)
    there = torch.where(ids == absent, 0, weights)
    expected = results(module, [x, ids.where(ids != absent, 0), there, dy, *factors], by_sums)
    expected["weights"] = torch.where(ids == absent, 0, expected["weights"])
    for name, value in expected.items():
        torch.testing.assert_close(tested[name], value, rtol=1e-4, atol=1e-5)


def test_all_experts_absent_and_no_tokens():
    module, (x, ids, weights, dy, *factors) = layer(torch.float32), drawn(torch.float32)
    found = results(module, [x, torch.full_like(ids, E), weights, dy, *factors], fast)
    assert all(not value.any() for value in found.values())
    found = results(module, [x[:0], ids[:0], weights[:0], dy[:0], *factors], fast)
    assert found["y"].shape == (0, HIDDEN)
    assert all(not value.any() for value in found.values())


MUTANTS = {
    "the rows of another expert": ("rows_by_expert", lambda f: lambda x, segments, k: f(x, segments, k).roll(1, 0)),
    "rows left sorted": ("rows_by_token", lambda f: lambda y, segments: y),
    "gate and up exchanged": ("gated_activation", lambda f: lambda h, *rest: f(h.roll(INNER, 1), *rest)),
    "a scaling left out": (
        "_product",
        lambda f: lambda e, n, x, s, adapters: f(e, n, x, s, {k: a._replace(scaling=1.5) for k, a in adapters.items()}),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_breaks_the_rule(monkeypatch, name):
    attribute, mutate = MUTANTS[name]
    monkeypatch.setattr(ours, attribute, mutate(getattr(ours, attribute)))
    assert broken(fast)


def test_the_gradient_of_a_token_is_its_copies_sum(monkeypatch):
    """One copy's instead of all of them."""

    def first(ctx, dy):
        return dy.index_select(0, ctx.inverse)[:: ctx.copies], None, None, None

    monkeypatch.setattr(_Copies, "backward", staticmethod(first))
    assert [line.partition(":")[0] for line in broken(fast)] == ["x", "x"]


def test_the_same_bits_at_each_call():
    module, tensors = layer(torch.float32), drawn(torch.float32)
    first, second = results(module, tensors, fast), results(module, tensors, fast)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiles_as_one_graph():
    module, tensors = layer(torch.float32), drawn(torch.float32)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    expected, found = results(module, tensors, fast), results(module, tensors, compiled)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_only_known_gates_are_fused(monkeypatch, device):
    """GPT-OSS clamps and shifts in a gate of its own, which is called."""
    module = moe("GptOss").model.layers[0].mlp.experts
    calls = []
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, h: calls.append(h.shape) or h[:, ::2])
    x, ids, weights = torch.randn(3, 32), torch.tensor([[0], [1], [3]]), torch.ones(3, 1)
    ours.experts_forward(module, x.to(device), ids.to(device), weights.to(device))
    assert calls == [(3, 48)]
