"""Which MLPs fuse_blocks takes: those whose forward does what the operation does, whatever its text."""

import pytest
import torch
from blocks_case import FUSED, MLP, ROWS, Halves, Plain, mlp_results
from torch.nn import functional as F

from lora_kernels import fuse_blocks
from lora_kernels.models.blocks import fusing
from lora_kernels.models.blocks.mlps import block_of


def after(m, e, u, act):
    return m.last(act(e) * u)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu2": lambda v: F.relu(v) ** 2,
}
FOUND = {
    **{
        f"gated {name}": (MLP, lambda m, x, f=f: m.last(f(m.first(x)) * m.second(x)), ("first", "second", "last"), name)
        for name, f in ACTIVATIONS.items()
    },
    **{
        f"plain {name}": (Plain, lambda m, x, f=f: m.last(f(m.first(x))), ("first", "last"), name)
        for name, f in ACTIVATIONS.items()
    },
    "the second is the gate": (MLP, lambda m, x: m.last(m.first(x) * F.silu(m.second(x))), ("second", "first", "last"), "silu"),
    "halves": (Halves, lambda m, x: after(m, *m.first(x).chunk(2, -1), F.silu), ("first", "last"), "silu"),
    "halves, up first": (Halves, lambda m, x: after(m, *m.first(x).chunk(2, -1)[::-1], F.gelu), ("first", "last"), "gelu"),
    "rows": (MLP, lambda m, x: m.last(F.silu(m.first(x.flatten(0, 1))) * m.second(x.flatten(0, 1))).view_as(x), None, "silu"),
    "in float32": (MLP, lambda m, x: m.last(F.silu(m.first(x).float()).to(x.dtype) * m.second(x)), None, "silu"),
    "cast before down": (Plain, lambda m, x: m.last(F.gelu(m.first(x)).to(m.last.weight.dtype)), None, "gelu"),
    "trailing dropout": (Plain, lambda m, x: m.drop(m.last(F.gelu(m.first(x)))), None, "gelu"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FOUND)
def test_the_wiring_is_found_and_results_are_the_module_s(name, dtype):
    kind, body, members, activation = FOUND[name]
    if name == "in float32" and dtype == torch.float64:
        pytest.skip("rounds")
    model = kind(body, dtype=dtype)
    x, generator = ROWS.to(dtype), torch.get_rng_state()
    expected = mlp_results(model, x)
    modes = [m.training for m in model.modules()]
    torch.set_rng_state(generator)
    report = fuse_blocks(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [m.training for m in model.modules()] == modes
    assert report.mlps == [""], report
    wiring = block_of(model).wiring
    assert wiring.activation == activation
    assert members is None or wiring.members == members
    got = mlp_results(model, x)
    assert report.calls() == {FUSED: 1}
    tolerance = 1e-9 if dtype == torch.float64 else 0.03
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


REFUSED = {
    "a factor of the gate": (MLP, lambda m, x: m.last(F.silu(m.first(x) * 0.7) * m.second(x)), "the nearest, silu"),
    "a factor near one": (MLP, lambda m, x: m.last(F.silu(m.first(x)) * m.second(x) * 1.003), "the nearest, silu"),
    "a factor of the result": (
        MLP,
        lambda m, x: m.last(F.silu(m.first(x)) * m.second(x)) * 0.7,
        "not that of last: it is off by 0.3",
    ),
    "a clamp": (MLP, lambda m, x: m.last(F.silu(m.first(x).clamp(max=20)) * m.second(x)), "is none of silu"),
    "another activation": (MLP, lambda m, x: m.last(F.mish(m.first(x)) * m.second(x)), "is none of silu"),
    "a norm": (MLP, lambda m, x: m.last(m.norm((F.silu(m.first(x)) * m.second(x)).to(m.norm.weight.dtype))), "is none of silu"),
    "a residual": (MLP, lambda m, x: x + m.last(F.silu(m.first(x)) * m.second(x)), "its result is not that of last"),
    "a changed input": (MLP, lambda m, x: m.last(F.silu(m.first(x * 2)) * m.second(x)), "goes unchanged into 1 of 3"),
    "called twice": (
        MLP,
        lambda m, x: m.last(F.silu(m.first(x)) * m.first(x) * m.second(x)),
        "does not call first exactly once",
    ),
    "weights themselves": (
        MLP,
        lambda m, x: F.linear((F.silu(m.first(x)) * m.second(x)).to(m.last.weight.dtype), m.last.weight),
        "does not call last",
    ),
    "a dropout inside": (MLP, lambda m, x: m.last(m.drop(F.silu(m.first(x)) * m.second(x))), "does not come last, in training"),
    "a dropout unseen": (
        MLP,
        lambda m, x: F.dropout(m.last(F.silu(m.first(x)) * m.second(x)), 0.5, m.training),
        "not that of last",
    ),
    "interleaved": (Halves, lambda m, x: m.last(F.silu(m.first(x)[..., ::2]) * m.first(x)[..., 1::2]), "does not call first"),
    "an error": (MLP, lambda m, x: m.last(F.silu(m.first(x)) * m.second(x)) + int("no"), "it raises ValueError"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_operation_is_refused_with_the_difference(name, dtype):
    kind, body, reason = REFUSED[name]
    model = kind(body, dtype=dtype)
    report = fuse_blocks(model)
    assert report.mlps == []
    assert reason in report.skipped[""]
    assert type(model) is kind


def test_exchanged_gate_and_up_are_caught(monkeypatch):
    original = fusing.wiring_of

    def exchanged(module, names):
        wiring = original(module, names)
        gate, up, down = wiring.members
        return wiring._replace(members=(up, gate, down))

    monkeypatch.setattr(fusing, "wiring_of", exchanged)
    assert "its result on a random input is off by" in fuse_blocks(MLP(FOUND["gated silu"][1])).skipped[""]


def test_it_tells_gelu_from_its_approximation_in_16_bits():
    for name in ("gelu", "gelu_tanh"):
        model = Plain(lambda m, x, f=ACTIVATIONS[name]: m.last(f(m.first(x)).to(m.last.weight.dtype)), dtype=torch.bfloat16)
        fuse_blocks(model)
        assert block_of(model).wiring.activation == name
