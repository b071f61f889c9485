"""A model that accelerate's hooks are put on after add_lora, its adapters under them: what works, and what is refused."""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import (
    LoRAConfig,
    add_lora,
    add_weighted_adapter,
    delete_adapter,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    save_merged,
    unmerge_lora,
)

CPU, CONFIG = torch.device("cpu"), LoRAConfig(r=2, init_lora_weights=False, target_modules=["0", "2"])
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))


def chain(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias), nn.ReLU(), nn.Linear(8, 8, bias))


def adapted(config=CONFIG, **options):
    model = chain()
    torch.manual_seed(1)
    add_lora(model, config, **options)
    return model.eval()


def hook(**options):
    return AlignDevicesHook(CPU, offload=True, **options)


def with_adapters(model):
    accelerate.cpu_offload(model, CPU)


def all_at_once(model):
    add_hook_to_module(model, hook(place_submodules=True))


def layers_at_once(model):
    for at in (0, 2):
        add_hook_to_module(model[at], hook(place_submodules=True))


def layers_alone(model):
    for at in (0, 2):
        add_hook_to_module(model[at], hook())


every_place = pytest.mark.parametrize("place", [with_adapters, all_at_once, layers_at_once])


def values(model):
    with torch.no_grad():
        return model(X)


CALLS = {  # with what is refused, and what the message says
    "load_adapter": (lambda model, folder, state: load_adapter(model, folder), "load an adapter"),
    "load_lora_state_dict": (lambda model, folder, state: load_lora_state_dict(model, state), "load an adapter"),
    "a second one loaded": (lambda model, folder, state: load_adapter(model, folder, "b"), "load an adapter"),
    "a second one added": (lambda model, folder, state: add_lora(model, CONFIG, "b"), "add an adapter"),
    "combined": (lambda model, folder, state: add_weighted_adapter(model, ["default"], [1.0], "b"), "combine adapters"),
    "merged": (lambda model, folder, state: merge_lora(model), "merge"),
    "saved merged": (lambda model, folder, state: save_merged(model, folder / "merged"), "save the merged model"),
}


@every_place
@pytest.mark.parametrize("call", CALLS)
def test_what_hooks_over_adapters_would_lose_or_break(place, call, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path)
    state, expected = {name: value + 1 for name, value in lora_state_dict(model).items()}, values(model)
    place(model)
    function, words = CALLS[call]
    with pytest.raises(RuntimeError, match=f"cannot {words}: accelerate offloads the adapters of 0; remove its hooks first"):
        function(model, tmp_path, state)
    assert torch.equal(values(model), expected)
    assert not (tmp_path / "merged").exists()
    remove_hook_from_submodules(model)
    function(model, tmp_path, state)  # the cure


def test_a_hook_over_a_deleted_adapter_knows_nothing_of_a_new_one():
    model = adapted()
    with_adapters(model)
    delete_adapter(model, "default")
    with pytest.raises(RuntimeError, match="cannot add an adapter: accelerate offloads the adapters of 0"):
        add_lora(model, CONFIG, "b")


@pytest.mark.parametrize("place", [with_adapters, layers_at_once])  # a layer sees nothing of a hook on a module around it
def test_training_is_refused(place):
    model = adapted().train()
    expected = values(model)
    place(model)
    with pytest.raises(RuntimeError, match="would get no gradients"):
        model(X)
    assert torch.equal(values(model), expected)
    remove_hook_from_submodules(model)
    model(X).sum().backward()
    assert model[0].lora_A["default"].grad.abs().sum() > 0


@every_place
def test_offloaded_adapters_are_saved(place, tmp_path):
    model = adapted()
    expected = lora_state_dict(model)
    place(model)
    save_adapter(model, tmp_path)
    other = adapted(LoRAConfig(r=2, target_modules=["0", "2"]))
    load_adapter(other, tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in lora_state_dict(other).items())


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("place", [layers_alone, with_adapters])
@pytest.mark.parametrize("twice", [False, True])
def test_merged_then_offloaded_then_unmerged(place, twice, quantize, tmp_path):
    model = adapted(quantize=quantize)
    expected = values(model)
    merge_lora(model)
    merged = values(model)
    place(model)
    if twice:
        remove_hook_from_submodules(model)
        place(model)
    assert torch.equal(values(model), merged)
    save_merged(model, tmp_path)
    unmerge_lora(model)
    assert model[0].weight.is_meta
    assert torch.equal(values(model), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(values(model), expected)


def test_offloaded_then_merged_then_offloaded_by_more_hooks_then_unmerged():
    model = adapted()
    expected = values(model)
    layers_alone(model)
    merge_lora(model)
    for at in (0, 2):
        add_hook_to_module(model[at], hook(weights_map=model[at]._hf_hook.weights_map), append=True)
    unmerge_lora(model)
    assert torch.equal(values(model), expected)


@pytest.mark.parametrize("place", [all_at_once, layers_at_once])
def test_a_merged_weight_that_is_kept_with_its_adapters_is_not_unmerged(place, tmp_path):
    model = adapted()
    merge_lora(model)
    expected = values(model)
    place(model)
    with pytest.raises(RuntimeError, match="cannot unmerge: accelerate offloads the adapters of 0; remove its hooks first"):
        unmerge_lora(model)
    if place is layers_at_once:
        with pytest.raises(RuntimeError, match="cannot unmerge: accelerate's hook offloads the weight together"):
            model[0].unmerge()
    with pytest.raises(RuntimeError, match="cannot save the merged model: accelerate offloads the adapters of 0"):
        save_merged(model, tmp_path)
    assert torch.equal(values(model), expected)


@pytest.mark.parametrize("base", [lambda: nn.Linear(8, 8), lambda: Conv1D(8, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(("init", "quantize"), [(False, "nf4"), ("pissa", None), (True, None)])
def test_the_plain_layer_of_one_that_was_offloaded(base, init, quantize):
    model = nn.Sequential(base(), nn.ReLU(), base())
    bases = LoRAConfig(r=2, init_lora_weights=init, target_modules=["0", "2"])
    add_lora(model, bases, quantize=quantize)
    with torch.no_grad():
        for at in (0, 2):
            model[at].active_adapter = None
    expected = values(model)
    layers_alone(model)
    remove_lora(model)
    assert model[0].weight.is_meta
    torch.testing.assert_close(values(model), expected)
    remove_hook_from_submodules(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    torch.testing.assert_close(values(model), expected)


@pytest.mark.parametrize("unmerged_first", [False, True])
def test_a_bias_that_merging_made_comes_back_when_hooks_are_removed(unmerged_first):
    model = accelerate.cpu_offload(chain(bias=False), CPU)
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, lora_bias=True, target_modules=["0", "2"]))
    for at in (0, 2):
        nn.init.normal_(model[at].lora_bias["default"])
    expected = values(model.eval())
    merge_lora(model)
    if unmerged_first:
        unmerge_lora(model)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(values(model), expected)
    if not unmerged_first:
        unmerge_lora(model)
    assert model[0].bias is None
    assert torch.equal(values(model), expected)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_4_bit_state_does_not_go_into_an_offloaded_layer(quantize):
    state, model = adapted(quantize="nf4").state_dict(), adapted(quantize=quantize)
    expected = values(model)
    layers_alone(model)
    with pytest.raises(RuntimeError, match="cannot load a 4-bit weight: accelerate offloads this layer's"):
        model.load_state_dict(state)
    assert torch.equal(values(model), expected)
    remove_hook_from_submodules(model)
    model.load_state_dict(state)
    assert model[0].quantized
