"""What PEFT's users pass to add_lora: a peft.LoraConfig, and models that have PEFT's layers already."""

import copy
import sys

import peft
import pytest
import tiny_models
import torch
from adapter_case import model
from model_case import QV, Model

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    accelerate,
    add_lora,
    load_adapter,
    lora_state_dict,
    merge_lora,
    save_adapter,
    save_merged,
)


def peft_models():
    config = peft.LoraConfig(target_modules=["q_proj"])
    prompts = peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2)
    hidden = Model()
    peft.inject_adapter_in_model(config, hidden)
    llama = tiny_models.llama()
    llama.add_adapter(config)
    return {
        "PeftModel": peft.get_peft_model(Model(), config),
        "compiled PeftModel": torch.compile(peft.get_peft_model(Model(), config)),
        "PeftModel without layers": peft.get_peft_model(tiny_models.llama(), prompts),
        "IA3": peft.get_peft_model(Model(), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        "layers inside": hidden,
        "transformers' add_adapter": llama,
    }


ACCELERATE = r"call accelerate\(model\) to let these compute with our kernels"
UNLOAD, ANEW, BASE = r"give PEFT's model\.unload\(\) to", "load the model anew for", r"give PEFT's model\.get_base_model\(\) to"
CURES = {  # what the error ends with
    "PeftModel": rf"layers, such as 'base_\S*q_proj', expected a model without; {ACCELERATE}, or {UNLOAD} add_lora$",
    "compiled PeftModel": rf"{ACCELERATE}, or {UNLOAD} add_lora$",
    "PeftModel without layers": rf"prompts, expected a model without; {BASE} add_lora$",
    "IA3": rf"expected a model without; {UNLOAD} add_lora$",
    "layers inside": rf"{ACCELERATE}, or {ANEW} add_lora$",
    "transformers' add_adapter": rf"{ACCELERATE}, or {ANEW} add_lora$",
}


@pytest.mark.parametrize("case", CURES)
def test_the_cures_for_a_model_with_peft_s_layers_work(case):
    model = peft_models()[case]
    if ACCELERATE in CURES[case]:
        assert accelerate(model).accelerated
    if ANEW not in CURES[case]:
        add_lora(model.unload() if UNLOAD in CURES[case] else model.get_base_model(), LoRAConfig(**QV))


@pytest.mark.parametrize("case", CURES)
def test_a_model_with_peft_s_layers_is_refused(case, tmp_path):
    save_to, own = tmp_path / "adapter", Model()
    add_lora(own, LoRAConfig(**QV))
    save_adapter(own, save_to)
    refused = peft_models()[case]
    names = list(refused.state_dict())
    for call in (
        lambda: add_lora(refused, LoRAConfig()),
        lambda: add_lora(refused, LoRAConfig(**QV), quantize="nf4"),
        lambda: load_adapter(refused, save_to),
    ):
        with pytest.raises(ValueError, match=rf"model: got a .* with PEFT's own .*{CURES[case]}"):
            call()
    assert list(refused.state_dict()) == names
    for function in (lora_state_dict, merge_lora, lambda m: save_merged(m, tmp_path), lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match=r"has PEFT's own layers, expected add_lora's"):
            function(refused)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj", "r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.5},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj"], "exclude_modules": ["0.q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "bias": "lora_only", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj"], "fan_in_fan_out": True},
    ],
)
def test_a_peft_config_is_taken(options):
    """The same layers, ranks and scalings as PEFT makes, and what else is trained."""
    config = peft.LoraConfig(**options)
    before = copy.deepcopy(config.to_dict())
    mine, theirs = model(), peft.get_peft_model(model(), copy.deepcopy(config)).base_model.model
    add_lora(mine, config)
    assert config.to_dict() == before
    found = {n: m.adapters["default"] for n, m in mine.named_modules() if isinstance(m, LoRALinear)}
    expected = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {n: (a.r, a.scaling) for n, a in found.items()} == {
        n: (m.r["default"], m.scaling["default"]) for n, m in expected.items()
    }
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (mine, theirs)]
    assert trained[0] == trained[1]


def test_peft_s_default_targets_are_those_of_the_type_of_model():
    report = add_lora(tiny_models.llama(), peft.LoraConfig())
    assert {path.rpartition(".")[2] for path in report.adapted} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"peft\.LoraConfig: target_modules is missing"):
        add_lora(Model(), peft.LoraConfig())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"layer_replication": [(0, 1)]}, "layer_replication is .*"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\]"),
    ],
)
def test_a_field_without_a_counterpart_is_named(options, field):
    with pytest.raises(ValueError, match=rf"peft\.LoraConfig: {field}, which has no counterpart here"):
        add_lora(Model(), peft.LoraConfig(**{"target_modules": ["q_proj"], **options}))
    with pytest.raises(ValueError, match="init_lora_weights: got 'eva', expected one of"):
        add_lora(Model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()))


def test_a_name_that_the_model_lacks_is_warned_of_in_peft_s_config_too():
    with pytest.warns(UserWarning, match="modules_to_save: 'lm_haed' matches no module"):
        add_lora(Model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_haed", "norm"]))


@pytest.mark.parametrize(
    ("config", "got"),
    [
        (None, "NoneType"),
        ({"r": 4}, r"dict, .*; LoRAConfig\(\*\*config\) makes one"),
        ("all-linear", "str"),
        (peft.IA3Config(), "IA3Config"),
        (LoRAConfig, "type"),
    ],
)
@pytest.mark.parametrize("without_peft", [False, True])
def test_other_configs_are_type_errors(config, got, without_peft, monkeypatch):
    if without_peft:
        monkeypatch.delitem(sys.modules, "peft")
    refused = Model()
    with pytest.raises(TypeError, match=rf"config: got {got}"):
        add_lora(refused, config)
    with pytest.raises(TypeError, match=r"expected a LoRAConfig, or peft\.LoraConfig"):
        add_lora(refused, config)
    assert not hasattr(refused, "_lora_state")
