"""State dicts of 4-bit layers: bitsandbytes' keys, files, the meta device, dense and corrupt states."""

import io

import pytest
import torch
from layer_4bit_case import K, N, bnb, layer4, linear4bit
from torch import nn

from lora_kernels import LoRALinear, quantize_nf4
from lora_kernels.nf4 import NF4Weight


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_of_bitsandbytes_loads(double_quant, storage):
    linear = linear4bit(double_quant=double_quant, storage=storage)
    state = linear.state_dict()
    for layer in (layer4(double_quant=not double_quant, blocksize=128), LoRALinear(K, N)):  # another format, and a dense layer
        result = layer.load_state_dict(state, strict=False)
        assert result.unexpected_keys == []
        assert sorted(result.missing_keys) == ["lora_A.default", "lora_B.default"]
        assert torch.equal(layer.matrix.dequantize(), NF4Weight.from_bnb(linear.weight).dequantize())
        assert torch.equal(layer.bias, linear.bias)
        assert layer.weight.data_ptr() != linear.weight.data_ptr()
        written = layer.state_dict()
        for name, value in state.items():
            assert written[name].dtype == value.dtype
            assert torch.equal(written[name].view(torch.uint8), value.view(torch.uint8)), name


def test_state_dict_is_read_by_bitsandbytes():
    layer = layer4(torch.bfloat16)
    state = {name.removeprefix("weight."): t for name, t in layer.state_dict().items() if name.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(layer.state_dict()["weight"], state, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(weight, weight.quant_state), layer.matrix.dequantize())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_through_a_file(assign):
    layer, other = layer4(torch.bfloat16, bias=False), layer4(torch.bfloat16, bias=False)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file), assign=assign)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert torch.equal(layer(x), other(x))


def test_loading_into_a_layer_on_the_meta_device():
    layer = layer4()
    with torch.device("meta"):
        empty = LoRALinear.from_linear(nn.Linear(K, N), quantize="nf4", r=4)
    assert empty.state_dict().keys() == layer.state_dict().keys()
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, K)
    assert torch.equal(layer(x), empty(x))


def test_a_dense_state_is_quantised():
    linear, layer = nn.Linear(K, N), layer4()
    layer.load_state_dict(linear.state_dict(), strict=False)
    assert torch.equal(layer.matrix.dequantize(), quantize_nf4(linear.weight.detach()).dequantize())


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("weight.absmax"),
        lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"),
        lambda s: s.update(weight=s["weight"][:-1]),
        lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}),
        lambda s: s.update({"weight.more": torch.ones(1)}),
        lambda s: s.update({k: v for k, v in quantized_state(64, 64).items() if k.startswith("weight")}),
        lambda s: [s.pop(name) for name in list(s) if name.startswith("weight.")],
    ],
)
def test_corrupt_states_change_nothing(damage):
    layer = layer4()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    state = {name: t.clone() for name, t in layer4().state_dict().items()}
    damage(state)
    with pytest.raises(ValueError, match="weight"):
        layer.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def quantized_state(K, N):
    return LoRALinear.from_linear(nn.Linear(K, N), quantize="nf4").state_dict()
