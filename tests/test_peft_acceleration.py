"""accelerate, restore and accelerated: what changes, what stays PEFT's, and what is counted."""

import copy
import pickle
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_model import FAST, IDS, Model, adapted, close, layer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_kernels import LoRAConfig, accelerate, accelerated, add_lora, restore


def test_parameters_keys_optimizer_and_methods_stay():
    model = adapted()
    before, keys, optimizer = dict(model.named_parameters()), list(model.state_dict()), torch.optim.SGD(model.parameters(), 0.1)
    report = accelerate(model)
    assert report.accelerated == ["base_model.model.up", "base_model.model.down"]
    assert not report.skipped
    assert not report.falling_back
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(layer(model), lora.Linear)
    assert repr(layer(model)).startswith("lora.Linear(")
    model(IDS).sum().backward()
    optimizer.step()
    assert report.calls() == {FAST: 2}


def test_it_is_idempotent_and_counts_go_on():
    model = adapted()
    accelerate(model)
    model(IDS)
    report = accelerate(model)
    assert len(report.accelerated) == 2
    assert report.calls() == {FAST: 2}
    assert str(report) == "2 of 2 LoRA layers fast now"


def test_restore_is_exactly_as_before():
    model = adapted()
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    expected = model(IDS)
    accelerate(model)
    close(model(IDS), expected)
    restore(model)
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    assert torch.equal(model(IDS), expected)
    restore(model)  # nothing to do


def test_other_layers_are_named_with_a_reason():
    plain = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    report = accelerate(get_peft_model(plain, LoraConfig(target_modules=["0", "1"])))
    assert report.accelerated == ["base_model.model.1"]
    assert "lora.Conv1d" in report.skipped["base_model.model.0"]
    assert str(report).startswith("1 of 2 LoRA layers fast now: 1 × a lora.Conv1d; lora.Linear")
    assert "not accelerated: base_model.model.0" in str(report)


def test_a_subclass_of_peft_s_layer_is_left_alone():
    class Special(lora.Linear):
        pass

    model = adapted()
    layer(model).__class__ = Special
    assert "lora.Special" in accelerate(model).skipped["base_model.model.up"]


@pytest.mark.parametrize("make", [Model, lambda: _changed_by_add_lora()])
def test_a_model_without_peft_layers_is_an_error(make):
    with pytest.raises(ValueError, match=r"without PEFT's LoRA layers.*get_peft_model"):
        accelerate(make())


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel, AveragedModel])
def test_paths_in_a_wrapped_model_are_the_plain_one_s(wrap):
    plain, model = adapted(), wrap(adapted())
    report = accelerate(model)
    assert report.accelerated == accelerate(plain).accelerated == ["base_model.model.up", "base_model.model.down"]
    close(model(IDS), plain(IDS))


def _changed_by_add_lora():
    model = Model()
    add_lora(model, LoRAConfig(target_modules=["up"]))
    return model


# ---- PEFT's own methods ----


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_accelerated_too(copier):
    model = adapted()
    accelerate(model)
    twin = copier(model)
    assert torch.equal(twin(IDS), model(IDS))
    assert accelerate(twin).calls() == {FAST: 2}
    layer(twin).lora_B["default"].weight.data.zero_()
    assert not torch.equal(twin(IDS), model(IDS))


def test_save_load_merge_and_switching_as_in_peft(tmp_path):
    plain = adapted(lora_dropout=0.1)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    ours.save_pretrained(tmp_path)
    base = adapted().unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    close(loaded(IDS), plain(IDS))
    for model in (plain, ours):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(target_modules=["up"], r=2, init_lora_weights=False))
        model.set_adapter("other")
    close(ours(IDS), plain(IDS))
    assert report.calls() == {FAST: 1, "no active adapter": 1}
    for model in (plain, ours):
        model.set_adapter("default")
        layer(model).set_scale("default", 3.0)
    close(ours(IDS), plain(IDS))
    for model in (plain, ours):
        model.add_weighted_adapter(["default"], [0.5], "weighted", combination_type="linear")
        model.delete_adapter("other")
        model.set_adapter("weighted")
        model.eval()  # PEFT makes its dropout in training mode
    close(ours(IDS), plain(IDS))
    close(ours.merge_and_unload()(IDS), plain.merge_and_unload()(IDS))


def test_scaling_as_a_tensor_for_hotswapping(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    adapted(seed=5, r=6, lora_alpha=3).save_pretrained(tmp_path)
    model = adapted(r=4)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    report = accelerate(model)
    model(IDS)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    assert isinstance(layer(model).scaling["default"], torch.Tensor)
    expected = peft.PeftModel.from_pretrained(adapted().unload(), tmp_path).eval()
    close(model(IDS), expected(IDS))
    assert report.calls() == {FAST: 4}


# ---- forwards replaced on the layer itself ----


class Doubles(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("hook_first", [True, False])
def test_accelerate_s_hook_on_a_layer_and_the_fast_path_both_run(hook_first):
    model = adapted()
    x = torch.randn(3, 24)
    expected = 2 * layer(model)(x)
    if hook_first:
        add_hook_to_module(layer(model), Doubles())
    report = accelerate(model)
    if not hook_first:
        add_hook_to_module(layer(model), Doubles())
    close(layer(model)(x), expected)
    assert report.calls() == {FAST: 1}
    restore(model)
    assert torch.equal(layer(model)(x), expected)
    remove_hook_from_module(layer(model))  # leaves the bound forward behind as an attribute
    report = accelerate(model)
    close(2 * layer(model)(x), expected)
    assert report.calls() == {FAST: 1}


def test_a_forward_replaced_by_something_else_is_refused_aloud():
    model = adapted()
    layer(model).forward = lambda x: x
    with pytest.warns(UserWarning, match="left as it is: its forward was replaced"):
        report = accelerate(model)
    assert report.accelerated == ["base_model.model.down"]
    assert "replaced on the instance" in report.skipped["base_model.model.up"]


# ---- new models ----


def test_accelerated_config_makes_accelerated_layers(tmp_path):
    config = LoraConfig(target_modules=["up", "down", "embed"], init_lora_weights=False)
    assert accelerated(config) is config
    torch.manual_seed(0)
    model = get_peft_model(Model(), config).eval()
    report = accelerate(model)
    model(IDS)
    assert report.calls() == {FAST: 3}
    assert not report.skipped
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        copy.deepcopy(model).unload(), tmp_path, config=accelerated(peft.PeftConfig.from_pretrained(tmp_path))
    )
    close(loaded(IDS), model(IDS))
    assert accelerate(loaded).calls() == {FAST: 3}
    model.add_adapter("more", accelerated(LoraConfig(target_modules=["head"])))
    assert not accelerate(copy.deepcopy(model)).falling_back.keys() - {"base_model.model.head"}
    pickle.loads(pickle.dumps(copy.deepcopy(config)))


def test_accelerated_config_leaves_other_custom_modules_to_their_owner():
    class Mine(lora.Linear):
        pass

    config = accelerated(LoraConfig(target_modules=["up", "head"]))
    config._register_custom_module({nn.Linear: Mine})
    assert type(layer(get_peft_model(Model(), config))) is Mine


def test_accelerated_refuses_another_config():
    with pytest.raises(TypeError, match=r"expected a peft\.LoraConfig"):
        accelerated(LoRAConfig())


# ---- tools ----


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
def test_torch_compile_in_one_graph(lora_dropout):
    model = adapted(lora_dropout=lora_dropout)
    accelerate(model)
    expected = model(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(IDS), expected)
    model.train()
    compiled(IDS).sum().backward()
    assert layer(model).lora_A["default"].weight.grad.abs().sum() > 0


def test_the_graph_has_these_kernels():
    model, found = adapted(), []
    accelerate(model)

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(model, fullgraph=True, backend=backend)(IDS)
    assert sum("lora_kernels.linear" in target for target in found) == 2


def test_importing_the_package_needs_no_peft():
    absent = "import sys; sys.modules.update(peft=None, safetensors=None, transformers=None, accelerate=None)"
    code = f"{absent}; import lora_kernels; print('ok')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "ok\n"


def test_no_warning_of_its_own():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model)
        model(IDS)
        restore(model)
