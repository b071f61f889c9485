"""add_lora under accelerate's hooks: W comes and goes with its hook, adapters stay, and results are those without hooks."""

import copy
import functools

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_submodules
from model_case import QV, TOKENS, Model, flags, snapshot, train
from offload_case import HOW, offload
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    save_merged,
    set_adapter,
    unmerge_lora,
)

every_way = pytest.mark.parametrize("how", HOW)


def pair(how, folder, **options):
    """The same model with the same adapter, in memory and offloaded before add_lora."""
    plain = Model(tie=False)
    kept = offload(copy.deepcopy(plain), how, folder)
    for model in (plain, kept):
        torch.manual_seed(1)
        add_lora(model, LoRAConfig(r=2, init_lora_weights=False, **options))
        for parameter in lora_parameters(model):
            nn.init.normal_(parameter)  # an adapter's own bias is zero at first
    return plain, kept


@every_way
def test_training_is_that_of_the_model_in_memory(how, tmp_path):
    plain, kept = pair(how, tmp_path, lora_dropout=0.1, lora_bias=True)
    assert {p.device.type for p in lora_parameters(kept)} == {"cpu"}
    where = kept.blocks[0].q_proj.weight.device
    for model in (plain, kept):
        torch.manual_seed(2)
        train(model)
    for name, expected in lora_state_dict(plain).items():
        torch.testing.assert_close(lora_state_dict(kept)[name], expected)
    torch.testing.assert_close(kept.eval()(TOKENS), plain.eval()(TOKENS))
    assert kept.blocks[0].q_proj.weight.device == where, "the weight is where its hook keeps it"
    for model in (plain, kept):
        set_adapter(model, None)
    torch.testing.assert_close(kept(TOKENS), plain(TOKENS))


def test_offloaded_weights_wait_on_the_meta_device(tmp_path):
    _, kept = pair("disk_offload", tmp_path)
    assert {p.is_meta for p in kept.parameters() if not p.requires_grad} == {True}


def test_dx_reads_the_weight_after_it_was_put_back(tmp_path):
    plain, kept = pair("disk_offload", tmp_path, target_modules=["out"])
    xs = [torch.randn(3, 6, requires_grad=True)]
    xs.append(xs[0].detach().clone().requires_grad_())
    for model, x in zip((plain, kept), xs, strict=True):
        model.blocks[0].out(x).square().sum().backward()
    torch.testing.assert_close(xs[1].grad, xs[0].grad)


@every_way
@pytest.mark.parametrize("lora_bias", [False, True])
def test_merging_saving_and_removing(how, lora_bias, tmp_path):
    plain, kept = pair(how, tmp_path / "offloaded", lora_bias=lora_bias)
    expected, device = kept(TOKENS), kept.blocks[0].q_proj.weight.device
    files = [load_file(save_merged(model, tmp_path / name)) for model, name in ((plain, "plain"), (kept, "kept"))]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[1][name], value) for name, value in files[0].items())
    merge_lora(kept)
    assert kept.blocks[0].q_proj.weight.device == device
    torch.testing.assert_close(kept.eval()(TOKENS), expected)
    merged = load_file(save_merged(kept, tmp_path / "merged"))
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in files[0].items())
    unmerge_lora(kept)
    assert kept.blocks[0].q_proj.weight.device == device
    assert torch.equal(kept(TOKENS), expected)
    merge_lora(kept)
    remove_lora(kept)
    assert type(kept.blocks[0].q_proj) is nn.Linear
    torch.testing.assert_close(kept(TOKENS), expected)


@every_way
def test_removing_leaves_the_hooks_as_they_were(how, tmp_path):
    plain = Model(tie=False)
    expected, model = plain(TOKENS), offload(plain, how, tmp_path)
    before = {name: (module, module._hf_hook) for name, module in model.named_modules() if hasattr(module, "_hf_hook")}
    trainable = flags(model)
    add_lora(model, LoRAConfig(r=2))
    remove_lora(model)
    assert {name: (m, m._hf_hook) for name, m in model.named_modules() if hasattr(m, "_hf_hook")} == before
    assert flags(model) == trainable
    assert torch.equal(model(TOKENS), expected)


@every_way
def test_adapters_are_saved_and_loaded(how, tmp_path):
    plain, kept = pair(how, tmp_path / "offloaded")
    save_adapter(kept, tmp_path / "adapter")
    other = offload(Model(tie=False), how, tmp_path / "other")
    load_adapter(other, tmp_path / "adapter")
    for name, value in lora_state_dict(plain).items():
        assert torch.equal(lora_state_dict(other)[name], value)


@pytest.mark.parametrize("same", [True, False])
def test_a_file_with_the_base_s_own_tensors_is_compared_with_the_offloaded_ones(same, tmp_path):
    plain = Model(tie=False)
    add_lora(plain, LoRAConfig(r=2, **QV))
    save_adapter(plain, tmp_path)
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.embed.weight"
    save_file({**load_file(file), key: plain.embed.weight.detach() + (0 if same else 1)}, file)
    other = Model(tie=False)
    other.embed.weight.data = plain.embed.weight.data.clone()
    offload(other, "disk_offload", tmp_path / "offloaded")
    if same:
        load_adapter(other, tmp_path)
        assert len(lora_parameters(other)) == 8
    else:
        with pytest.raises(ValueError, match=r"embed\.weight' holds another base weight than this model's"):
            load_adapter(other, tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_hooks_may_be_removed_later(merged, tmp_path):
    plain, kept = pair("cpu_offload", tmp_path)
    if merged:
        merge_lora(kept.eval())
    remove_hook_from_submodules(kept)
    torch.testing.assert_close(kept(TOKENS), plain(TOKENS))
    if merged:
        unmerge_lora(kept)
        assert torch.equal(kept(TOKENS), plain(TOKENS))
    train(kept)
    remove_lora(kept)
    assert not hasattr(kept.blocks[0].q_proj, "_hf_hook")
    remove_lora(plain)
    assert torch.equal(kept(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_a_model_that_is_offloaded_with_its_adapters_computes_and_does_not_pretend_to_train(how, tmp_path):
    model = Model(tie=False)
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, lora_bias=True))
    expected = model(TOKENS)
    offload(model, how, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected)
    with pytest.raises(RuntimeError, match="would get no gradients: dispatch the model before add_lora"):
        model(TOKENS)
    with pytest.raises(RuntimeError, match="cannot merge: accelerate offloads the adapters of blocks"):
        merge_lora(model)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected)


def test_copies_have_hooks_of_their_own(tmp_path):
    _, kept = pair("cpu_offload", tmp_path)
    twin, expected = copy.deepcopy(kept), kept(TOKENS)
    assert twin.blocks[0].q_proj.forward.args[0] is twin.blocks[0].q_proj
    merge_lora(twin.eval())
    nn.init.zeros_(twin.blocks[0].q_proj.lora_B["default"])
    assert torch.equal(kept(TOKENS), expected)


def test_compiled(tmp_path):
    _, kept = pair("cpu_offload", tmp_path)
    torch.testing.assert_close(torch.compile(kept, backend="eager")(TOKENS), kept(TOKENS))


@pytest.mark.parametrize("base", [nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("sequential", [False, True])
def test_one_layer(base, sequential):
    hook = AlignDevicesHook(execution_device="cpu", offload=True)
    if sequential:
        hook = SequentialHook(AlignDevicesHook(io_same_device=True), hook)
    expected = LoRALinear.from_linear(copy.deepcopy(base), r=2)
    layer = LoRALinear.from_linear(add_hook_to_module(copy.deepcopy(base), hook), r=2)
    layer.load_state_dict({name: value for name, value in expected.state_dict().items() if "lora" in name}, strict=False)
    nn.init.ones_(layer.lora_B["default"])
    nn.init.ones_(expected.lora_B["default"])
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), expected(x))
    for made in (layer, expected):
        made.eval().merge()
    assert torch.equal(layer(x), expected(x))


# ---- refused, before anything changes ----


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"init_lora_weights": "pissa"}, {}, "got 'pissa' for a weight on the meta device.*without offloading"),
        ({}, {"quantize": "nf4"}, "hook offloads its weight, which cannot be quantised there"),
        ({"bias": "all"}, {}, "q_proj.bias: the adapter has its own, but accelerate offloads"),
        ({"modules_to_save": ["norm"]}, {}, r"norm: the adapter has its own, but accelerate offloads blocks\.0\.norm\.weight"),
    ],
)
def test_what_needs_the_weight_itself(options, arguments, words, tmp_path):
    model = Model(tie=False)
    expected, _ = model(TOKENS), offload(model, "cpu_offload", tmp_path)
    before, trainable = list(model.named_modules()), flags(model)
    with pytest.raises(ValueError, match=words):
        add_lora(model, LoRAConfig(r=2, **QV, **options), **arguments)
    assert list(model.named_modules()) == before
    assert flags(model) == trainable
    assert not hasattr(model, "_lora_state")
    assert torch.equal(model(TOKENS), expected)


def test_a_layer_that_another_module_s_hook_loads():
    model = Model(tie=False)
    accelerate.cpu_offload(model, preload_module_classes=["Block"])
    with pytest.raises(ValueError, match="hook of a module around it loads its weight: leave that out of preload_module"):
        add_lora(model, LoRAConfig(**QV))


class Doubles(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


class Mine(AlignDevicesHook):
    pass


def other_hook(layer):
    add_hook_to_module(layer, Doubles())


def other_hook_behind(layer):
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(layer, Doubles(), append=True)


def subclass_of_a_hook(layer):
    add_hook_to_module(layer, Mine(execution_device="cpu"))


def hook_without_gradients(layer):
    hook = AlignDevicesHook(execution_device="cpu")
    hook.no_grad = True
    add_hook_to_module(layer, hook)


def replaced_around_a_hook(layer):
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))
    layer.forward = functools.partial(lambda forward, x: -forward(x), layer.forward)


def replaced_inside_a_hook(layer):
    layer.forward = lambda x: -x
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu"))


@pytest.mark.parametrize(
    "change",
    [
        *(other_hook, other_hook_behind, subclass_of_a_hook, hook_without_gradients),
        *(replaced_around_a_hook, replaced_inside_a_hook),
    ],
)
def test_other_replaced_forwards(change):
    model = Model()
    change(model.blocks[0].q_proj)
    report = add_lora(model, LoRAConfig(**QV))
    assert "replaced on the instance, by something other than accelerate's" in report.skipped["blocks.0.q_proj"]
    with pytest.raises(ValueError, match="linear: its forward was replaced on the instance"):
        LoRALinear.from_linear(model.blocks[0].q_proj)


def test_a_removed_hook_leaves_nothing_behind():
    model = Model()
    offload(model, "cpu_offload", None)
    remove_hook_from_submodules(model)
    before = snapshot(model)
    assert not add_lora(model, LoRAConfig(**QV)).skipped
    train(model)
    remove_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
