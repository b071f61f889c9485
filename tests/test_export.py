"""save_merged: the values, the file format, streaming, what transformers reads back."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, lora_parameters, merge_lora, remove_lora, save_merged
from lora_kernels.commands.measure import peak_bytes
from lora_kernels.models.export import merged_tensors

safetensors = pytest.importorskip("safetensors.torch")


def tuned(quantize, dtype=torch.bfloat16, sizes=(64, 96, 64), **config):
    layers = [nn.Linear(K, N) for K, N in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers, nn.LayerNorm(sizes[-1])).to(dtype)
    model.register_buffer("steps", torch.tensor(3))
    add_lora(model, LoRAConfig(r=4, target_modules=[str(i) for i in range(len(layers))], **config), quantize=quantize)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_().mul_(0.1)
    return model


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_values(quantize, dtype, tmp_path):
    model = tuned(quantize, bias="lora_only")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = copy.deepcopy(model)
    for i in (0, 1):
        layer = expected[i]
        W = layer.matrix.dequantize(torch.float32) if quantize else layer.weight.float()
        merged = W + layer.adapters["default"].scaling * (layer.lora_B["default"] @ layer.lora_A["default"])
        expected[i] = nn.Linear(*W.T.shape)
        expected[i].weight, expected[i].bias = nn.Parameter(merged.to(dtype or torch.bfloat16)), layer.bias
    plain = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in expected.state_dict().items()}
    found = safetensors.load_file(save_merged(model, tmp_path / "out", dtype=dtype))
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, msg=name)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_merged_model_and_one_without_an_active_adapter(tmp_path):
    model = tuned(None)
    merged = dict(merged_tensors(model))
    merge_lora(model.eval())
    assert all(torch.equal(t, merged[name]) for name, t in merged_tensors(model))
    remove_lora(model)
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_merged(model, tmp_path)


def test_one_layer_at_a_time(tmp_path):
    """Six layers of 512 x 512: less than all six in float32, of which each needs up to four while it is made."""
    model = tuned("nf4", sizes=(512,) * 7)
    dense = 512 * 512 * 4
    assert peak_bytes(lambda: save_merged(model, tmp_path)) < 6 * dense
    assert peak_bytes(lambda: dict(merged_tensors(model, torch.float32))) > 5.9 * dense


def test_an_error_leaves_no_file(tmp_path, monkeypatch):
    model = tuned("nf4")
    monkeypatch.setattr("lora_kernels.models.export._merged_weight", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_merged(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_transformers_reads_the_exported_model(tmp_path):
    import tiny_llama
    from transformers import AutoModelForCausalLM

    tiny_llama.write(tmp_path / "base", hidden=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    add_lora(model, LoRAConfig(r=4, init_lora_weights=False, target_modules="all-linear"), quantize="nf4")
    ids = torch.randint(0, 200, (2, 12))
    save_merged(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_linear4bit_without_an_adapter_is_dequantised():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, bias=True), nn.Linear(96, 64)).to("cpu").train()
    add_lora(model, LoRAConfig(r=2, target_modules=["1"]))
    found = dict(merged_tensors(model))
    assert found.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(found["0.weight"], bnb.functional.dequantize_4bit(model[0].weight, model[0].weight.quant_state))
