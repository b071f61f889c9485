"""LoRALinear over 4-bit weights: from dense layers and bitsandbytes', moving, merging, resetting."""

import copy
import pickle

import pytest
import torch
from layer_4bit_case import K, N, expected_y, layer4, linear4bit
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, quantize_nf4


def test_from_linear():
    linear = nn.Linear(K, N).eval()
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    layer = LoRALinear.from_linear(linear, quantize="nf4", r=4, init_lora_weights=False)
    w = quantize_nf4(linear.weight.detach())
    assert torch.equal(layer.weight.view(-1), w.codes)
    assert torch.equal(layer.matrix.dequantize(), w.dequantize())
    assert not layer.training
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), expected_y(layer, x))
    assert seen == [1]
    assert "nf4 of torch.float32 in blocks of 64" in repr(layer)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A.default", "lora_B.default"]


def test_the_dense_weight_is_not_kept_alive():
    import gc
    import weakref

    linear = nn.Linear(K, N)
    weight = weakref.ref(linear.weight)
    layer = LoRALinear.from_linear(linear, quantize="nf4")
    del linear
    gc.collect()
    assert weight() is None
    assert layer.to_linear().weight.shape == (N, K)


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(N, K)
    layer = LoRALinear.from_linear(conv, quantize="nf4", r=4, init_lora_weights=False)
    assert layer.matrix.shape == (N, K)
    assert torch.equal(layer.matrix.codes, quantize_nf4(conv.weight.detach().T).codes)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), expected_y(layer, x))
    plain = layer.to_linear()
    assert type(plain) is Conv1D
    layer.set_adapter(None)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_linear4bit_shares_its_bytes(storage, double_quant, quant_type):
    linear = linear4bit(storage=storage, double_quant=double_quant, quant_type=quant_type)
    x = torch.randn(3, K)
    expected = linear(x)
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer._weight_absmax.data_ptr() == linear.weight.quant_state.absmax.data_ptr()
    torch.testing.assert_close(layer(x), expected)
    layer.set_adapter(None)
    torch.testing.assert_close(layer(x), expected)
    again = layer.to_linear()
    assert type(again) is type(linear)
    assert again.weight.data_ptr() == linear.weight.data_ptr()
    assert again.weight.dtype == storage
    assert torch.equal(again(x), expected)


@pytest.mark.filterwarnings("ignore:bitsandbytes repacked")
def test_linear4bit_that_was_evaluated():
    """On a CPU with AVX512-bf16 instructions it has repacked its weight by then; the values it computes with are taken over."""
    linear = linear4bit(torch.bfloat16, compute_dtype=torch.bfloat16).eval()
    linear.support_avx512bf16_for_cpu = pytest.importorskip("bitsandbytes").functional.has_avx512bf16()
    x = torch.randn(3, K, dtype=torch.bfloat16)
    expected = linear(x)
    repacked = getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
    layer = LoRALinear.from_linear(linear, r=4)
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.to_linear().train()(x), expected, rtol=2e-2, atol=2e-2)
    assert (layer.weight.data_ptr() != linear.weight.data_ptr()) == repacked


def test_compute_dtype():
    linear = linear4bit(torch.bfloat16, compute_dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, r=4)
    x = torch.randn(3, K)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    wide = LoRALinear.from_linear(linear4bit(torch.bfloat16, compute_dtype=torch.float32), r=4)
    assert wide(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_casting_and_copying(dtype):
    layer = layer4(dtype)
    W = layer.matrix.dequantize()
    x = torch.randn(3, K)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).half().float(),
        copy.deepcopy(layer).double(),
        copy.deepcopy(layer).to("cpu"),
        copy.deepcopy(layer).share_memory(),
    ):
        assert torch.equal(other.matrix.dequantize(), W)
        assert other.matrix.dtype == dtype
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert other(x.to(other.lora_A["default"].dtype)).shape == (3, N)
    assert layer.to("meta").matrix.device.type == "meta"
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.to_empty(device="cpu")
    layer.matrix.check()


def test_merged_layers_move_with_what_unmerge_restores():
    layer = layer4()
    codes = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, codes)
    layer.matrix.check()


@pytest.mark.parametrize("double_quant", [False, True])
def test_merge_and_unmerge(double_quant):
    layer = layer4(torch.bfloat16, double_quant=double_quant).eval()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    W, A, B = layer.matrix.dequantize(torch.float32), layer.lora_A["default"].float(), layer.lora_B["default"].float()
    wanted = W + layer.adapters["default"].scaling * (B @ A)
    error = layer.merge()
    assert layer.merged
    merged = layer.matrix.dequantize(torch.float32)
    assert error == pytest.approx(((merged - wanted).norm() / wanted.norm()).item(), rel=1e-3)
    assert 0 < error < 0.2
    assert layer.matrix.dtype == torch.bfloat16
    x = torch.randn(3, K, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.matrix.dequantize(), layer.bias))
    with pytest.raises(RuntimeError, match="merge again"):
        layer.merge()
    layer.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_merge_of_an_adapter_of_zeros_is_nearly_nothing():
    """W is a point of the format; quantised again it stays one, up to absmax's rounding."""
    layer = layer4(torch.float32, double_quant=False, init_lora_weights=True)
    assert layer.merge() < 1e-7


def test_initialisations_that_rewrite_the_weight_are_refused():
    with pytest.raises(ValueError, match="init_lora_weights: got 'pissa' for a 4-bit weight"):
        layer4(init_lora_weights="pissa")
    model = nn.Sequential(nn.Linear(K, N))
    weight = model[0].weight
    with pytest.raises(ValueError, match="4-bit"):
        add_lora(model, LoRAConfig(r=2, init_lora_weights="olora", target_modules=["0"]), quantize="nf4")
    assert model[0].weight is weight
    assert weight.requires_grad


def test_reset_parameters():
    layer = layer4()
    codes, A = layer.weight.clone(), layer.lora_A["default"].clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, codes)
    assert not torch.equal(layer.lora_A["default"], A)
    layer.matrix.check()


def test_quantize_names():
    with pytest.raises(ValueError, match="quantize: got 'int8', expected None or 'nf4'"):
        LoRALinear.from_linear(nn.Linear(K, N), quantize="int8")
    with pytest.raises(ValueError, match="quantize: got 'fp4'"):
        add_lora(nn.Sequential(nn.Linear(K, N)), LoRAConfig(), quantize="fp4")


def test_compiled_layer():
    torch._dynamo.reset()
    layer = layer4(torch.bfloat16)
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
    assert x.grad is not None
