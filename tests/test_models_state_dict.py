"""lora_state_dict and load_lora_state_dict."""

import pytest
import torch
from model_case import QV, TOKENS, Model, snapshot, train

from lora_kernels import LoRAConfig, add_lora, load_lora_state_dict, lora_parameters, lora_state_dict


def test_state_dict_round_trip():
    config = LoRAConfig(r=2, bias="lora_only", modules_to_save=["blocks.0.norm", "lm_head"], **QV)
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    add_lora(model, config)
    train(model)
    state = {name: value.clone() for name, value in lora_state_dict(model).items()}
    assert {"blocks.0.q_proj.lora_A.default", "blocks.0.q_proj.bias.default"} <= state.keys()
    assert {"lm_head.modules_to_save.default.weight", "blocks.0.norm.modules_to_save.default.bias"} <= state.keys()
    add_lora(base, config)
    load_lora_state_dict(base, state)
    assert torch.equal(base(TOKENS), model(TOKENS))
    assert sum(p.numel() for p in lora_parameters(model)) == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.0.q_proj.lora_A.default"), r"missing 1, such as \['blocks.0.q_proj.lora_A.default'\]"),
        (lambda s: s.update(x=torch.ones(1)), r"unknown 1, such as \['x'\]"),
        (
            lambda s: s.update({"blocks.0.q_proj.lora_A.default": torch.ones(3, 8)}),
            r"lora_A.default: got shape \(3, 8\), expected \(2, 8\)",
        ),
        (
            lambda s: s["blocks.1.q_proj.lora_B.default"].fill_(torch.nan),
            r"1 of its tensors are lost: 'blocks.1.q_proj.lora_B.default' holds NaN or infinity in 16 of 16 values",
        ),
        (
            lambda s: s.update({"blocks.0.q_proj.lora_A.default": torch.full((2, 8), 1e300, dtype=torch.float64)}),
            r"16 of 16 values beyond 3.40282e\+38, float32's largest",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, words):
    model = Model()
    add_lora(model, LoRAConfig(r=2, **QV))
    before = snapshot(model)
    state = {name: torch.ones_like(value) for name, value in lora_state_dict(model).items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        load_lora_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
