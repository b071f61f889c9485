"""PEFT's target_parameters under accelerate: the numbers of PEFT and of float64, and no stack of W + B·A."""

import copy

import pytest
import torch
from experts_case import IDS, MODELS, Largest, in_double, moe, run, stacks, with_peft
from peft import LoraConfig, get_peft_model
from peft_model import FAST
from torch import nn

from lora_kernels import accelerate, accelerated, restore
from lora_kernels.integrations.peft import experts as integration


def apart(tested, exact):
    """The results that are not the exact ones, to float32's rounding through a whole model."""
    assert tested.keys() == exact.keys()
    return [name for name, value in exact.items() if (tested[name] - value).abs().max() > 2e-5 * value.abs().max()]


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name):
    model = with_peft(moe(name))
    theirs, exact = run(model), run(in_double(model))
    report = accelerate(model)
    assert len(report.accelerated) == 2 * (1 if name in ("DeepseekV3", "NemotronH") else 2), "wrappers of each layer"
    assert not report.falling_back
    assert not report.skipped
    assert not report.without_lora
    ours = run(model)
    assert report.calls() == {FAST: len(report.accelerated)}
    assert not apart(ours, exact)
    assert not apart(theirs, exact)
    assert all(value.abs().max() > 1e-6 for value in ours.values()), "a gradient of zeros proves nothing"
    restore(model)
    assert torch.equal(run(model)["logits"], theirs["logits"])


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj"])
def test_one_of_the_two_parameters(name):
    model = with_peft(moe("GptOss"), [name])
    exact = run(in_double(model))
    report = accelerate(model)
    assert not apart(run(model), exact)
    assert report.calls() == {FAST: 2}


def test_a_layout_taken_for_another_is_seen(monkeypatch):
    """B as if an expert's columns were together, which its shape does not tell."""
    model = with_peft(moe("Mixtral"))
    exact = run(in_double(model))
    accelerate(model)
    wrong = lambda A, B, E: (A.unflatten(0, (E, -1)), B.unflatten(1, (E, -1)).transpose(0, 1).contiguous())  # noqa: E731
    monkeypatch.setattr(integration, "stacked", wrong)
    assert len(apart(run(model), exact)) > 4


def test_bfloat16_with_adapters_in_float32():
    """Nearer to float64 than PEFT, which rounds W + B·A to bfloat16; router weights decide the same in both."""
    model = with_peft(moe("Mixtral").bfloat16())
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if ".lora_" in name)
    ours = copy.deepcopy(model)
    accelerate(ours)
    exact, theirs, own = run(in_double(model)), run(model), run(ours)
    error = [(found["logits"].double() - exact["logits"]).norm() / exact["logits"].norm() for found in (own, theirs)]
    assert error[0] <= 1.5 * error[1]
    assert {name: t.dtype for name, t in own.items()} == {name: t.dtype for name, t in theirs.items()}


def test_no_stack_of_weights_is_formed():
    """Forward and backward allocate nothing of the size of [E, out, in], and PEFT does."""
    found = {}
    for way in ("peft", "accelerated"):
        model = with_peft(moe("Qwen3Moe"), r=2)
        smallest = min(p.numel() for name, p in model.named_parameters() if p.ndim == 3)
        if way == "accelerated":
            accelerate(model)
        with Largest(model) as mode:
            run(model, IDS[:, :4])
        found[way] = mode.elements / smallest
    assert found["peft"] >= 1
    assert found["accelerated"] < 0.5, found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.base_model.disable_adapter_layers(), "adapters are disabled"),
        (lambda m: m.merge_adapter(), "adapters are merged"),
        (lambda m: m.base_model.set_adapter(["default", "other"]), "several active adapters"),
        (lambda m: m.base_model.set_adapter("elsewhere"), "no active adapter"),
        (lambda m: inner(m).register_forward_hook(lambda *_: None), "a member has hooks"),
        (lambda m: setattr(outer(m), "_did_swap_in_out_features", False), "in and out are exchanged"),
    ],
)
def test_a_state_that_is_peft_s_to_compute(change, reason):
    model = with_peft(moe("Qwen2Moe"))
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    elsewhere = copy.copy(model.peft_config["default"])
    elsewhere.target_parameters, elsewhere.target_modules = None, ["q_proj"]
    model.add_adapter("elsewhere", elsewhere)
    change(model)
    plain = None if reason.startswith("in and out") else model(input_ids=IDS).logits
    report = accelerate(model)
    path = "base_model.model.model.layers.0.mlp.experts"
    assert reason in report.falling_back[path]
    assert reason in str(report)
    if plain is not None:
        assert torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-5)
        assert any(reason in counted for counted in report.calls())


def outer(model):
    return model.get_base_model().model.layers[0].mlp.experts


def inner(model):
    return outer(model).base_layer.base_layer


def test_a_config_that_makes_accelerated_layers():
    """PEFT wraps the second parameter around the accelerated wrapper of the first."""
    model = moe("Mixtral")
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=stacks(model), init_lora_weights=False)
    model = get_peft_model(model, accelerated(config))
    ours, exact = run(model), run(in_double(restored(model)))
    assert not apart(ours, exact)
    assert accelerate(model).calls()[FAST] == 6


@pytest.mark.parametrize("first", ["add", "accelerate"])
def test_adapters_are_switched(first):
    """An adapter may come later, into the accelerated wrappers."""
    model = with_peft(moe("Mixtral"))
    if first == "accelerate":
        accelerate(model)
    model.add_adapter("other", copy.copy(model.peft_config["default"]))
    model.set_adapter("other")
    assert len(accelerate(model).accelerated) == 4
    exact = run(in_double(restored(model)))
    assert not apart(run(model), exact)
    with model.disable_adapter():
        assert torch.allclose(model(input_ids=IDS).logits, moe("Mixtral")(input_ids=IDS).logits, atol=1e-6)


def restored(model):
    model = copy.deepcopy(model)
    restore(model)
    return model


def test_parameters_of_other_modules_stay_peft_s():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return (x @ self.weight.mT).sum(0)

    model = with_peft(nn.Sequential(nn.Linear(5, 5), Stack()), ["1.weight"])
    report = accelerate(model)
    assert not report.accelerated
    assert "Stack is no experts class" in report.skipped["base_model.model.1"]


def test_peft_s_messages_name_its_class():
    model = with_peft(moe("Mixtral"))
    accelerate(model)
    assert "lora.ParamWrapper(\n  parameter_name='down_proj'" in repr(outer(model))
    assert stacks(moe("Mixtral")) == ["experts.down_proj", "experts.gate_up_proj"]
