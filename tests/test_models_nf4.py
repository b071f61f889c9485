"""add_lora and its companions over 4-bit weights, and a transformers model loaded in 4 bits."""

import copy
import pickle
import re

import pytest
import tiny_models
import torch
from layer_4bit_case import K, N, bnb, linear4bit
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    quantize_nf4,
    remove_lora,
    set_adapter,
    unmerge_lora,
)


@pytest.mark.parametrize("position", [0, 1])
def test_a_corrupt_state_of_a_model_changes_no_layer(position):
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K), nn.LayerNorm(K))
    add_lora(model, LoRAConfig(r=2, target_modules=["0", "1"]), quantize="nf4")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t * 2 if t.is_floating_point() and "quant_map" not in name else t.clone() for name, t in before.items()}
    state[f"{position}.weight.absmax"] = state[f"{position}.weight.absmax"][1:]
    with pytest.raises(ValueError, match=rf"{position}\.weight: absmax"):
        model.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=rf"{position}\.weight: absmax"):
            other.load_state_dict(state)
        other.load_state_dict(before)
        remove_lora(other)
        assert not other._load_state_dict_pre_hooks
    assert model._load_state_dict_pre_hooks


def mlp(dtype=torch.bfloat16):
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).to(dtype)


def test_add_switch_merge_remove():
    model = mlp()
    dense = copy.deepcopy(model)
    report = add_lora(model, LoRAConfig(r=4, target_modules=["0", "2"]), quantize="nf4")
    assert report.total == sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8) + 2 * K * N
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))
    add_lora(model, LoRAConfig(r=2, target_modules=["2"]), "second")
    x = torch.randn(5, K, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_()
    set_adapter(model, None)
    base = model(x)
    set_adapter(model, "default")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    errors = merge_lora(model.eval())
    assert sorted(errors) == ["0", "2"]
    assert all(0 < error < 0.2 for error in errors.values())
    unmerge_lora(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    remove_lora(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), base)
    assert torch.equal(model[0].weight, quantize_nf4(dense[0].weight.detach()).dequantize())
    assert model[0].weight.requires_grad


def test_unquantised_linear4bit_is_left_alone_with_a_reason():
    model = nn.Sequential(bnb.nn.Linear4bit(K, N), linear4bit())
    report = add_lora(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert "not quantised yet" in report.skipped["0"]
    assert list(report.adapted) == ["1"]


def test_training_changes_the_adapters_alone():
    model = mlp(torch.float32)
    add_lora(model, LoRAConfig(r=8, lora_dropout=0.1, target_modules=["0", "2"]), quantize="nf4")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    x = torch.randn(64, K)
    losses = []
    for _ in range(30):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(lora_state_dict(model))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_transformers_model_loaded_in_4_bit(tmp_path, storage):
    """Converted in place, trained a few steps, saved, read back by transformers without this package."""
    import tiny_llama
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama.write(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    options = {"device_map": "cpu", "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, **options).train()
    ids = torch.randint(0, 200, (2, 12))
    base = model(ids).logits
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    report = add_lora(model, LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    assert len(report.adapted) == 14
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in pointers} == pointers
    assert torch.equal(model(ids).logits, base)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    set_adapter(model, None)
    assert torch.equal(model(ids).logits, base)
    remove_lora(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options).train()
    assert torch.equal(again(ids).logits, base)


@pytest.mark.parametrize("where", ["whole", "inside", "part"])
def test_what_transformers_keeps_in_high_precision_is_adapted_and_stays_dense(where):
    """T5 reads the dtype of `wo`, and fails over codes."""
    model = tiny_models.t5()
    given = {"whole": model, "inside": nn.ModuleDict({"llm": model}), "part": model.encoder}[where]
    report = add_lora(given, LoRAConfig(r=4, target_modules=["q", "wi", "wo"]), quantize="nf4")
    assert report.left_dense.keys() == {path for path in report.adapted if path.endswith(".wo")}
    assert re.search(r"not quantised: .*wo and \d more: T5\w+ lists \['wo'\] in _keep_in_fp32_modules", str(report))
    for path in report.adapted:
        assert given.get_submodule(path).quantized == (path not in report.left_dense), path
    second = add_lora(given, LoRAConfig(r=2, target_modules=["wo"]), "second", quantize="nf4")
    assert not second.left_dense, "a layer stays what it was"
    model(**tiny_models.MODELS["t5"].batch()).loss.backward()
