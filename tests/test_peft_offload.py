"""PEFT's layers under accelerate's hooks: fast, with the tensors that the hooks bring, and PEFT's results."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from offload_case import HOW, offload
from peft_model import FAST, IDS, Model, adapted, close, layer

from lora_kernels import accelerate, restore
from lora_kernels.integrations.peft import linear as accelerated_linear

every_way = pytest.mark.parametrize("how", HOW)


@every_way
@pytest.mark.parametrize("accelerated_first", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_a_dispatched_peft_model_is_fast(how, accelerated_first, use_dora, tmp_path):
    plain = adapted(use_dora=use_dora)
    ours = copy.deepcopy(plain)
    if accelerated_first:
        report = accelerate(ours)
    offload(ours, how, tmp_path)
    where = [tensor.device for tensor in ours.parameters()]
    if not accelerated_first:
        report = accelerate(ours)
    assert not report.falling_back
    with torch.no_grad():
        close(ours(IDS), plain(IDS))
        close(torch.compile(copy.deepcopy(ours), backend="eager")(IDS), plain(IDS))
    assert report.calls() == {FAST: 2}
    assert [tensor.device for tensor in ours.parameters()] == where
    with ours.disable_adapter():
        close(ours(IDS), plain.unload()(IDS))
    assert report.calls() == {FAST: 2, "adapters are disabled": 2}


@every_way
def test_the_report_names_what_a_hook_does_not_change(how, tmp_path):
    plain = adapted()
    offload(plain, how, tmp_path)
    for name in ("up", "down"):
        layer(plain, name).base_layer.weight.requires_grad_(True)
    report = accelerate(plain)
    with torch.no_grad():
        plain(IDS)
    assert set(report.falling_back.values()) == {"the base weight is trained"}
    assert report.calls() == {FAST: 0, "the base weight is trained": 2}
    assert str(report).startswith("0 of 2 LoRA layers fast now: 2 × the base weight is trained")


def test_adapters_that_peft_made_on_the_meta_device(tmp_path):
    """PEFT puts an adapter where the weight is, which is nowhere between calls if the base was offloaded before."""
    model = Model()
    dispatch_model(model, {"embed": "cpu", "up": "disk", "down": "cpu", "head": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    model = adapted(model=model)
    assert layer(model).lora_A["default"].weight.is_meta
    report = accelerate(model)
    assert report.falling_back == {"base_model.model.up": "tensors on different devices"}
    with torch.no_grad():
        layer(model)(torch.randn(3, 24))
    assert report.calls() == {FAST: 0, "tensors on different devices": 1}


@pytest.mark.parametrize("hook", [{"offload": True}, {"offload": True, "io_same_device": True}, {}], ids=str)
def test_training_is_that_of_the_model_in_memory(hook):
    """The base layers are offloaded and the adapters are not: PEFT itself trains none that are (0.21)."""
    gradients = []
    for hooked in (False, True):
        model = adapted(lora_dropout=0.2).train()
        if hooked:
            for name in ("up", "down"):
                add_hook_to_module(layer(model, name).base_layer, AlignDevicesHook(execution_device="cpu", **hook))
        report = accelerate(model)
        torch.manual_seed(4)
        model(IDS).square().sum().backward()
        assert report.calls() == {FAST: 2}
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 4
    for name, expected in gradients[0].items():
        close(gradients[1][name], expected)


def test_merging_is_peft_s(tmp_path):
    plain = adapted()
    ours = offload(copy.deepcopy(plain), "cpu_offload", tmp_path)
    report = accelerate(ours)
    ours.merge_adapter()
    close(ours(IDS), plain(IDS))
    ours.unmerge_adapter()
    close(ours(IDS), plain(IDS))
    assert report.calls() == {FAST: 2, "adapters are merged": 2}
    restore(ours)
    close(ours(IDS), plain(IDS))


def test_hooks_in_sequence():
    model = adapted()
    expected = model(IDS)
    for name in ("up", "down"):
        hooks = AlignDevicesHook(io_same_device=True), AlignDevicesHook(execution_device="cpu", offload=True)
        add_hook_to_module(layer(model, name).base_layer, SequentialHook(*hooks))
    report = accelerate(model)
    close(model(IDS), expected)
    assert report.calls() == {FAST: 2}


@pytest.mark.parametrize("change", ["falls back", "fails"])
def test_tensors_go_back_where_the_call_does_not_come_to_its_end(change, monkeypatch):
    model = adapted()
    up = layer(model)
    add_hook_to_module(up.base_layer, AlignDevicesHook(execution_device="cpu", offload=True))
    report = accelerate(model)
    if change == "falls back":
        up.lora_A["default"].bias = torch.nn.Parameter(torch.zeros(4))
        model(IDS)
        assert report.calls() == {FAST: 1, "lora_A has a bias": 1}
    else:
        monkeypatch.setattr(accelerated_linear, "compute", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(IDS)
    assert up.base_layer.weight.is_meta


def test_a_4_bit_layer_on_a_device_of_its_own():
    """Several GPUs in a device_map: a hook without offloading. Where accelerate offloads, the 4-bit weight's absmax is lost."""
    bnb = pytest.importorskip("bitsandbytes")
    from peft.tuners.lora.bnb import Linear4bit

    model = Model()
    model.up = bnb.nn.Linear4bit(24, 40, quant_type="nf4").to("cpu").train()
    model.is_loaded_in_4bit = True
    model = adapted(model=model, target_modules=["up"]).train()
    add_hook_to_module(layer(model).base_layer, AlignDevicesHook(execution_device="cpu"))
    report = accelerate(model)
    assert isinstance(layer(model), Linear4bit)
    y = model(IDS)
    assert report.calls() == {FAST: 1}
    restore(model)
    close(y, model(IDS))
