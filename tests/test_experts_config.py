"""What add_lora(LoRAConfig(target_parameters=[…])) refuses, and what it reports."""

import pytest
from experts_case import moe, with_peft

from lora_kernels import AdaLoRAConfig, LoRAConfig, add_lora


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True}, "lora_bias: got True, expected False with target_parameters"),
        ({"use_dora": True}, "use_dora: got True, expected False with target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"target_parameters": ["experts.gate_up"]}, r"match no stack of experts; near names: \['experts.gate_up_proj'"),
        ({"target_parameters": ["router.weight", "gate.weight"]}, "skipped: .*no stack of an experts class"),
    ],
)
def test_what_experts_cannot_have(options, message):
    model = moe("Mixtral")
    with pytest.raises(ValueError, match=message):
        add_lora(model, LoRAConfig(**{"target_parameters": ["experts.down_proj"], **options}))
    assert not any(".lora_" in name for name, _ in model.named_parameters())


def test_what_a_config_cannot_have():
    with pytest.raises(TypeError, match="target_parameters: got 'w', expected a list of names"):
        LoRAConfig(target_parameters="w")
    with pytest.raises(ValueError, match="AdaLoRA, as PEFT's, has none"):
        AdaLoRAConfig(target_parameters=["w"])
    assert LoRAConfig(target_parameters=["w"]).target_modules == []
    assert LoRAConfig().target_modules == "all-linear"
    with pytest.raises(ValueError, match="target_modules: got"):
        LoRAConfig(target_modules=[])


def test_reports():
    model = moe("Mixtral")
    config = LoRAConfig(target_parameters=["experts.down_proj"], target_modules=["q_proj"], init_lora_weights="gaussian")
    report = add_lora(model, config)
    assert "4 LoRA layers" in str(report)
    A = model.model.layers[0].mlp.experts.down_proj.lora_A["default"]
    assert A.shape == (32, 24)
    assert 0.1 < A.std() < 0.15, "1/8, and not 1/32"


def test_a_peft_config_means_the_same():
    theirs, ours = with_peft(moe("Mixtral"), rank_pattern={"experts.down_proj": 5}), moe("Mixtral")
    report = add_lora(ours, theirs.peft_config["default"])
    shapes = {tuple(p.shape) for p in theirs.parameters() if p.requires_grad}
    assert {tuple(p.shape) for p in ours.parameters() if p.requires_grad} == shapes
    assert set(report.adapted.values()) == {3, 5}
