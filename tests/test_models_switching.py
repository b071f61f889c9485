"""What an adapter trains in a whole model, and switching between adapters and the base model."""

import warnings

import pytest
import tiny_models
import torch
from model_case import QV, TOKENS, Model, flags, snapshot, train
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    add_weighted_adapter,
    delete_adapter,
    lora_parameters,
    lora_state_dict,
    remove_lora,
    save_adapter,
    set_adapter,
)


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


CHANGES = {
    "resized head": (["lm_head"], lambda model: model.resize_token_embeddings(64, mean_resizing=False)),
    "resized embedding": (["embed_tokens"], lambda model: model.resize_token_embeddings(64, mean_resizing=False)),
    "head of the same size": (["lm_head"], lambda model: setattr(model, "lm_head", nn.Linear(32, 60, bias=False))),
    "another kind": (["lm_head"], lambda model: setattr(model, "lm_head", nn.Identity())),
}
USES = {
    "lora_parameters": lora_parameters,
    "lora_state_dict": lora_state_dict,
    "save_adapter": lambda model: save_adapter(model, "out"),
    "save_pretrained": lambda model: model.save_pretrained("out"),
    "set_adapter": lambda model: set_adapter(model, None),
    "delete_adapter": lambda model: delete_adapter(model, "default"),
    "remove_lora": remove_lora,
    "add_lora": lambda model: add_lora(model, LoRAConfig(target_modules=["v_proj"]), "second"),
    "add_weighted_adapter": lambda model: add_weighted_adapter(model, ["default"], [0.5], "mix"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_is_replaced_after_add_lora(use, change, tmp_path, monkeypatch):
    """It would be trained and not saved, or the reverse."""
    monkeypatch.chdir(tmp_path)
    names, replace = CHANGES[change]
    model = tiny_models.llama(tie_word_embeddings=False)
    add_lora(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=names))
    replace(model)
    before, own = snapshot(model), flags(model)
    name = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}[names[0]]
    with pytest.raises(ValueError, match=rf"^{name}: got a .* replaced or resized since.* before add_lora$"):
        USES[use](model)
    assert snapshot(model).keys() == before.keys()
    assert flags(model) == own
    assert list(model._lora_state.configs) == ["default"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("active", ["default", None])
def test_new_parameters_of_the_same_shape_are_the_trained_ones(active):
    """load_state_dict(assign=True), as fully_shard, gives modules new parameters."""
    model = Model()
    add_lora(model, LoRAConfig(r=2, bias="lora_only", modules_to_save=["lm_head"], **QV))
    train(model)
    set_adapter(model, active)
    model.load_state_dict({name: value * 2 for name, value in snapshot(model).items()}, assign=True)
    expected = model(TOKENS)
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert any(p is model.blocks[0].q_proj.bias for p in lora_parameters(model)) == (active is not None)
    if active is not None:
        assert torch.equal(lora_state_dict(model)["blocks.0.q_proj.bias.default"], model.blocks[0].q_proj.bias)
    for name in ("default", None, active):
        set_adapter(model, name)
    assert torch.equal(model(TOKENS), expected)


def test_a_parameter_of_another_shape():
    model = Model()
    add_lora(model, LoRAConfig(r=2, bias="lora_only", **QV))
    model.blocks[0].q_proj.bias = None
    with pytest.raises(ValueError, match=r"blocks\.0\.q_proj\.bias: got a NoneType of \[\], expected .* of \[\(8,\)\]"):
        lora_parameters(model)
