"""save_pretrained of a transformers model with LoRA layers: whose it is, given state dicts, and what lay there before."""

import copy
import pickle

import accelerate
import pytest
import tiny_models
import torch
from pretrained_case import IDS, TARGETS, adapted, again, same_states
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, remove_lora, set_adapter

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained wrote the model without its adapters")
RANDOM = {"r": 4, "init_lora_weights": False}


def by_accelerate(model, directory):
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.unwrap_model(prepared).save_pretrained(
        directory, state_dict=accelerator.get_state_dict(prepared), save_function=accelerator.save, is_main_process=True
    )


def by_state_dict(model, directory):
    model.save_pretrained(directory, state_dict=model.state_dict())


def by_compiled(model, directory):
    model.save_pretrained(directory, state_dict=torch.compile(model).state_dict())


def by_plain_keys(model, directory):
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    model.save_pretrained(directory, state_dict=state)


@pytest.mark.parametrize("save", [by_accelerate, by_state_dict, by_compiled, by_plain_keys])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_model_s_own_state_is_written_as_without_it(save, base, tmp_path):
    model = adapted(tmp_path, base, modules_to_save=["model.norm"])
    model.save_pretrained(tmp_path / "expected")
    save(model, tmp_path / "out")
    for name in ("model.safetensors", "adapters/adapter_model.safetensors"):
        expected, found = (load_file(tmp_path / directory / name) for directory in ("expected", "out"))
        assert found.keys() == expected.keys()
    read = again(tmp_path / "out")
    load_adapter(read, tmp_path / "out" / "adapters")
    assert torch.equal(read(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_merged_model_s_own_state_is_written_dense(base, tmp_path):
    model = adapted(tmp_path, base)
    merge_lora(model)
    for name, state in {"given": model.state_dict(), "none": None}.items():
        model.save_pretrained(tmp_path / name, state_dict=state)
        with torch.no_grad():
            torch.testing.assert_close(again(tmp_path / name)(IDS).logits, model(IDS).logits, rtol=0.05, atol=0.05)


def test_another_state_is_written_as_it_is_with_a_warning(tmp_path):
    model = adapted(tmp_path, "dense")
    state = model.state_dict()
    state.pop("model.norm.weight")
    with pytest.warns(UserWarning, match=r"state_dict: got \d+ tensors that are not the model's own, .* save_adapter writes"):
        model.save_pretrained(tmp_path / "out", state_dict=state)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == state.keys()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_model_that_nobody_else_holds(copied, tmp_path):
    model = adapted(tmp_path, "dense")
    copied(model).save_pretrained(tmp_path / "out")
    read = again(tmp_path / "out")
    load_adapter(read, tmp_path / "out" / "adapters")
    assert torch.equal(read(IDS).logits, model(IDS).logits)


def test_the_class_is_the_model_s_own_to_others():
    """transformers knows models, and what they can do, by the names of their classes."""
    model, other = tiny_models.llama(), tiny_models.llama()
    for each in (model, other):
        add_lora(each, LoRAConfig(**RANDOM, **TARGETS))
    assert type(model) is type(other)
    assert isinstance(model, LlamaForCausalLM)
    assert str(type(model)) == str(LlamaForCausalLM)
    assert model.can_generate()
    assert model(IDS, output_hidden_states=True).hidden_states
    remove_lora(model)
    assert type(model) is LlamaForCausalLM
    assert type(model.model) is type(tiny_models.llama().model)


@pytest.mark.parametrize("where", ["wrapper", "inner"])
def test_a_transformers_model_inside_what_was_adapted_writes_its_base(where, tmp_path):
    model = tiny_models.llama()
    plain = copy.deepcopy(model)
    add_lora(nn.ModuleDict({"llm": model}) if where == "wrapper" else model, LoRAConfig(**RANDOM, **TARGETS))
    part, expected = (model, plain) if where == "wrapper" else (model.model, plain.model)
    with pytest.warns(UserWarning, match=r"nothing of the adapters \['default'\], which belong to the model around it"):
        part.save_pretrained(tmp_path / "out")
    read = type(expected).from_pretrained(tmp_path / "out")
    assert same_states(read, expected.state_dict())


def test_an_inner_model_that_was_adapted_saves_itself(tmp_path):
    model = tiny_models.llama()
    plain = copy.deepcopy(model.model)
    add_lora(model.model, LoRAConfig(**RANDOM, **TARGETS))
    model.model.save_pretrained(tmp_path / "out")
    read = type(plain).from_pretrained(tmp_path / "out")
    assert same_states(read, plain.state_dict())
    load_adapter(read, tmp_path / "out" / "adapters")
    assert same_states(read, model.model.state_dict())


def test_adapters_that_were_saved_there_before_are_removed(tmp_path):
    """Beside another base they would be applied to it; what is not ours stays."""
    model = adapted(tmp_path, "dense")
    add_lora(model, LoRAConfig(**RANDOM, target_modules=["v_proj"]), "team/sql")
    folder = tmp_path / "out" / "adapters"
    model.save_pretrained(tmp_path / "out")
    (folder / "README.md").write_text("mine")
    other = adapted(tmp_path, "dense")
    other.save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    (folder / "README.md").unlink()
    merge_lora(other)
    other.save_pretrained(tmp_path / "out")
    assert not folder.exists()


def test_merged_it_says_which_adapters_are_written_nowhere(tmp_path):
    model = adapted(tmp_path, "dense")
    add_lora(model, LoRAConfig(**RANDOM, target_modules=["v_proj"]), "sql")
    set_adapter(model, "sql")
    merge_lora(model)
    with pytest.warns(UserWarning, match=r"nothing of the adapters \['default'\], which are not merged; save_adapter"):
        model.save_pretrained(tmp_path / "out")
