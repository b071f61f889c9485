"""What an adapter trains in a whole model, and switching between adapters and the base model."""

import warnings

import pytest
import torch
from model_case import QV, TOKENS, Model, snapshot, train

from lora_kernels import LoRAConfig, add_lora, lora_parameters, lora_state_dict, set_adapter


def test_training_changes_only_the_adapter():
    model = Model()
    report = add_lora(model, LoRAConfig(r=2, **QV))
    before = snapshot(model)
    train(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{path}.lora_{m}.default" for path in report.adapted for m in "AB"}
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_base_model_is_one_call_away():
    model = Model()
    expected = model(TOKENS)
    add_lora(model, LoRAConfig(r=2, bias="all", modules_to_save=["lm_head", "norm"]))
    assert torch.allclose(model(TOKENS), expected, atol=1e-6)
    train(model)
    trained = model(TOKENS)
    assert not torch.allclose(trained, expected, atol=1e-4)
    set_adapter(model, None)
    assert torch.equal(model(TOKENS), expected), "no trained bias or module remains"
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS), trained)


def test_two_adapters():
    model = Model()
    add_lora(model, LoRAConfig(r=2, modules_to_save=["blocks.0.norm"], **QV))
    train(model)
    first = model(TOKENS)
    report = add_lora(model, LoRAConfig(r=3, target_modules=["q_proj", "out"], modules_to_save=["blocks.0.norm"]), "second")
    assert torch.equal(model(TOKENS), first), "a new adapter waits for set_adapter"
    assert len(report.adapted) == 4
    first_parameters = {id(p) for p in lora_parameters(model)}
    set_adapter(model, "second")
    assert not first_parameters & {id(p) for p in lora_parameters(model)}
    train(model)
    second = model(TOKENS)
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS), first)
    set_adapter(model, "second")
    assert torch.equal(model(TOKENS), second)
    with pytest.raises(ValueError, match="adapter_name: got 'second', which is in use"):
        add_lora(model, LoRAConfig(**QV), "second")
    with pytest.raises(ValueError, match="bias: got 'all' for a second adapter, expected 'none'"):
        add_lora(model, LoRAConfig(bias="all", **QV), "third")
    with pytest.raises(KeyError, match="adapter 'x': not found"):
        set_adapter(model, "x")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases(bias):
    model = Model()
    add_lora(model, LoRAConfig(bias=bias, **QV))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    own = {f"blocks.{i}.q_proj.bias" for i in range(2)}
    everything = own | {f"blocks.{i}.{name}.bias" for i in range(2) for name in ("out", "norm")}
    assert trained == {"none": set(), "lora_only": own, "all": everything}[bias]
    assert {f"{name}.default" for name in trained} == {name for name in lora_state_dict(model) if ".bias." in name}


def test_an_adapter_that_is_thawed_inside_ddp_is_warned_of(tmp_path):
    """DistributedDataParallel registers, when it is made, the parameters that are trainable then."""
    model = Model(tie=False)
    for name in ("default", "second"):
        add_lora(model, LoRAConfig(r=2, **QV), name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_adapter(model, "second")
        set_adapter(model, "default")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_adapter(wrapped, "default")
            set_adapter(wrapped, None)
        with pytest.warns(
            UserWarning, match="'second' was frozen or set aside until now.* not synchronised; wrap the model again"
        ):
            set_adapter(wrapped, "second")

        model = Model(tie=False)
        add_lora(model, LoRAConfig(r=2, modules_to_save=["norm"], bias="lora_only", **QV))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
            for name in (None, "default"):  # whose copies were in the model
                set_adapter(wrapped, name)
            set_adapter(wrapped, None)
            wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.warns(UserWarning, match="adapter 'default' was frozen or set aside until now"):
            set_adapter(wrapped, "default")
    finally:
        torch.distributed.destroy_process_group()
