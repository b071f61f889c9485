"""4-bit weights under accelerate's hooks: those that leave them on a device of their own, and those that offload."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from layer_4bit_case import K, N, linear4bit
from torch import nn

from lora_kernels import LoRAConfig, add_lora, merge_lora, remove_lora, unmerge_lora


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_weight_on_a_device_of_its_own(quantize):
    made = nn.Linear(K, N) if quantize else linear4bit()
    model, plain = nn.Sequential(add_hook_to_module(made, AlignDevicesHook(execution_device="cpu"))), nn.Sequential(made)
    hook = made._hf_hook
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False), quantize=quantize)
    assert model[0]._hf_hook is hook
    x = torch.randn(3, K)
    expected = model(x)
    expected.sum().backward()
    assert model[0].lora_A["default"].grad.abs().sum() > 0
    merge_lora(model.eval())
    unmerge_lora(model)
    assert torch.equal(model(x), expected)
    remove_lora(model)
    assert model[0]._hf_hook is hook
    assert model[0].forward.args == (model[0],)
    W = model[0].weight
    torch.testing.assert_close(model(x), plain(x), atol=0.2 if quantize else 0, rtol=0)
    assert model[0].weight is W


def test_an_offloaded_linear4bit_is_left_alone():
    """accelerate 1.15 moves its quantisation state to the meta device with it, and bitsandbytes' own forward fails then too."""
    hook = AlignDevicesHook(execution_device="cpu", offload=True)
    model = nn.Sequential(add_hook_to_module(linear4bit(), hook), nn.Linear(N, 4))
    report = add_lora(model, LoRAConfig(target_modules=["0", "1"]))
    assert "offloads its 4-bit weight, whose absmax it does not bring back" in report.skipped["0"]
    assert list(report.adapted) == ["1"]


def test_a_quantised_layer_that_is_offloaded_later():
    model = nn.Sequential(nn.Linear(K, N))
    add_lora(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False), quantize="nf4")
    x = torch.randn(3, K, requires_grad=True)
    gradients = []
    for _ in range(2):
        model(x).sum().backward()
        gradients.append([x.grad, model[0].lora_A["default"].grad])
        x.grad = model[0].lora_A["default"].grad = None
        if not gradients[1:]:
            add_hook_to_module(model[0], AlignDevicesHook(execution_device="cpu", offload=True))
    assert model[0].weight.is_meta
    for before, after in zip(*gradients, strict=True):
        assert torch.equal(after, before)
    expected = model.eval()(x)
    merge_lora(model)
    assert model[0].weight.is_meta
    assert not torch.equal(model(x), expected), "merging quantised again"
    unmerge_lora(model)
    assert torch.equal(model(x), expected)
