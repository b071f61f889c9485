"""An accelerated PEFT layer computes what PEFT's own does: every output and gradient, by the one tolerance rule."""

import copy

import pytest
import torch
from peft_case import FAST, Layer
from test_linear_mutants import gradient_of
from torch import nn

from lora_kernels import accelerate

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_dtypes_with_fp32_adapters_over_a_16_bit_base(dtype, lora_dropout):
    Layer(dtype=dtype, lora_dropout=lora_dropout).check()


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only", "lora_bias": True},
        {"use_rslora": True},
        {"r": 1},
        {"r": 8, "rank_pattern": {"0": 3}, "alpha_pattern": {"0": 5}},
    ],
    ids=str,
)
def test_options(dtype, options):
    Layer(dtype=dtype, options=tuple(options.items())).check()


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_conv1d(dtype, lora_dropout):
    Layer(dtype=dtype, conv1d=True, lora_dropout=lora_dropout).check()


@pytest.mark.parametrize("shape", [(1,), (17,), (2, 1, 5), ()])
def test_shapes(shape):
    Layer(shape=shape, bias=False).check()


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=str)
def test_autocast(dtype, options):
    Layer(dtype=dtype, autocast=BF16, options=tuple(options.items())).check()


def test_adapters_in_the_weights_dtype():
    Layer(dtype=BF16, autocast_adapter_dtype=False, options=(("lora_bias", True),)).check()


def test_lora_bias_in_bf16_over_a_float32_layer_without_bias():
    layer = Layer(bias=False, options=(("lora_bias", True),))
    model = layer.build()
    part = model.base_model.model[0]
    part.lora_A["default"].to(BF16), part.lora_B["default"].to(BF16)
    part.cast_input_dtype_enabled = True
    report = accelerate(model)
    assert model(torch.randn(2, layer.K)).dtype == FP32
    assert report.calls() == {FAST: 1}


@pytest.mark.parametrize("field", ["x", "lora_A", "lora_B"])
def test_a_gradient_that_is_one_percent_off_is_noticed(monkeypatch, field):
    gradient_of(field)(monkeypatch)
    with pytest.raises(AssertionError, match="error"):
        Layer().check()


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, apart from parameters and x itself."""
    known = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    kept: dict[int, int] = {}

    def pack(t):
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def test_x_is_never_copied_to_float32_and_h_alone_is_kept():
    layer = Layer(shape=(64,), K=96, dtype=BF16, lora_dropout=0.1)
    model = layer.build()
    accelerate(model)
    x = torch.randn(64, 96).to(BF16).requires_grad_()
    assert saved_bytes(model, x) <= 64 * 4 * 4 + 8 + 8  # h in float32, the seed


def test_lora_fa_keeps_nothing_of_x():
    model = Layer(shape=(64,), K=96).build()
    accelerate(model)
    model.base_model.model[0].lora_A["default"].requires_grad_(False)
    x = torch.randn(64, 96)  # a leaf without gradient that, were it kept, would be new to `saved_bytes`
    model.base_model.model[0].register_forward_pre_hook(lambda _, args: (args[0] + 0,))
    assert saved_bytes(model, x) <= 64 * 4 * 4


def test_dropout_follows_peft_s_own_module_at_each_call():
    model = Layer(shape=(512,), lora_dropout=0.5).build()
    accelerate(model)
    x, layer = torch.randn(512, 24), model.base_model.model[0]
    model.train()
    assert not torch.equal(model(x), model(x))
    layer.lora_dropout["default"].p = 0.0
    assert torch.equal(model(x), model(x))
    layer.lora_dropout["default"].p = 1.0
    torch.testing.assert_close(model(x), layer.base_layer(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model(x), layer.base_layer(x))


def test_dropout_agrees_with_peft_s_in_distribution():
    """Mean and variance over many masks, within five standard errors of the difference."""
    plain = Layer(shape=(1,), K=16, N=8, lora_dropout=0.25).build()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    x = torch.randn(1, 16).expand(20_000, 16)
    with torch.no_grad():
        a, b = plain(x).double(), ours(x).double()
    n = len(a)
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * ((a.var(0) + b.var(0)) / n).sqrt()).all()
    fourth = ((a - a.mean(0)) ** 4).mean(0) - a.var(0) ** 2 + ((b - b.mean(0)) ** 4).mean(0) - b.var(0) ** 2
    assert ((a.var(0) - b.var(0)).abs() < 5 * (fourth / n).sqrt()).all()


def test_the_output_may_be_changed_in_place():
    plain = Layer().build()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    x = torch.randn(2, 3, 24)
    for model in (plain, ours):
        y = model(x)
        y += 1
        y.mul_(2)
        y.square().sum().backward()
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
