"""Calls of accelerated PEFT layers that go to PEFT's own forward: its result, and the reason in the counts."""

import copy
import functools

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from peft import LoraConfig
from peft.tuners import lora
from peft_model import FAST, IDS, adapted, close, layer
from torch import nn

from lora_kernels import accelerate


def merged(model):
    model.merge_adapter()


def disabled(model):
    model.base_model.disable_adapter_layers()


def two_active(model):
    model.add_adapter("other", LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def none_active(model):
    model.base_model.set_adapter([])


def base_trained(model):
    layer(model).base_layer.weight.requires_grad_(True)
    layer(model, "down").base_layer.weight.requires_grad_(True)


def hooked(part):
    def change(model):
        for name in ("up", "down"):
            module = layer(model, name).get_submodule(part)
            module.register_forward_hook(lambda module, args, y: 2 * y)

    return change


def inner_forward(model):
    for name in ("up", "down"):
        module = layer(model, name).lora_A["default"]
        module.forward = functools.partial(lambda module, x: -type(module).forward(module, x), module)


class Doubles(ModelHook):
    def post_forward(self, module, output):
        return 2 * output


def other_hook_of_accelerate_s(model):
    for name in ("up", "down"):
        base = layer(model, name).base_layer
        add_hook_to_module(base, AlignDevicesHook(execution_device="cpu", offload=True))
        add_hook_to_module(base, Doubles(), append=True)


def other_dropout(model):
    for name in ("up", "down"):
        layer(model, name).lora_dropout["default"] = nn.AlphaDropout(0.1).eval()


def lora_a_with_bias(model):
    for name in ("up", "down"):
        layer(model, name).lora_A["default"].bias = nn.Parameter(torch.ones(4))


def trained_scaling(model):
    for name in ("up", "down"):
        layer(model, name).scaling["default"] = torch.tensor(0.7, requires_grad=True)


def global_hook(model):
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    return handle.remove


FALLBACKS = [
    (merged, "adapters are merged"),
    (disabled, "adapters are disabled"),
    (two_active, "several active adapters"),
    (none_active, "no active adapter"),
    (base_trained, "the base weight is trained"),
    (hooked("base_layer"), "base has hooks"),
    (hooked("lora_A.default"), "lora_A has hooks"),
    (hooked("lora_B.default"), "lora_B has hooks"),
    (hooked("lora_dropout.default"), "dropout has hooks"),
    (inner_forward, "lora_A's forward was replaced on the instance"),
    (other_hook_of_accelerate_s, "base's forward was replaced on the instance"),
    (other_dropout, "lora_dropout is a AlphaDropout"),
    (lora_a_with_bias, "lora_A has a bias"),
    (trained_scaling, "scaling is no constant 0-d tensor"),
    (global_hook, "global module hooks"),
]


@pytest.mark.parametrize(("change", "reason"), FALLBACKS, ids=[reason for _, reason in FALLBACKS])
@pytest.mark.parametrize("changed_first", [True, False])
def test_what_falls_back_gives_peft_s_own_result_and_says_why(change, reason, changed_first):
    plain = adapted()
    ours = copy.deepcopy(plain)
    if not changed_first:
        report = accelerate(ours)
    undo = []
    for model in (plain, ours):
        torch.manual_seed(9)
        undo.append(change(model))
    if changed_first:
        report = accelerate(ours)
        assert str(report).startswith(f"0 of 2 LoRA layers fast now: 2 × {reason}\n")
        assert set(report.falling_back) == set(report.accelerated), "said before the first call"
    try:
        assert torch.equal(ours(IDS), plain(IDS))
    finally:
        for call in filter(None, undo):
            call()
    assert report.calls() == {FAST: 0, reason: 2}


def test_variants_fall_back():
    plain = adapted(alora_invocation_tokens=[1])
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    assert torch.equal(ours(IDS), plain(IDS))
    assert report.calls() == {FAST: 0, "the variant ALoraLinearVariant": 2}
    assert report.falling_back.keys() == set(report.accelerated)
    assert str(report).startswith("0 of 2 LoRA layers fast now: 2 × the variant ALoraLinearVariant\n")


def test_one_of_several_adapters_is_fast():
    plain = adapted()
    plain.add_adapter("other", LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    ours.set_adapter("other")
    plain.set_adapter("other")
    close(ours(IDS), plain(IDS))
    assert report.calls()[FAST] == 2
    with pytest.raises(TypeError):  # PEFT gives them to the base layer
        layer(ours)(torch.randn(2, 24), other=1)
    assert report.calls()["extra arguments"] == 1


def test_inputs_that_do_not_fit_get_peft_s_own_error():
    model = adapted()
    accelerate(model)
    for x in (torch.ones(2, 24, dtype=torch.int64), torch.randn(2, 23), torch.randn(2, 24, dtype=torch.float64)):
        messages = []
        for forward in (layer(model), functools.partial(lora.Linear.forward, layer(model))):
            with pytest.raises(RuntimeError) as error:
                forward(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_a_subclass_of_tensor_and_torch_func_fall_back():
    model = adapted()
    report = accelerate(model)
    batch = torch.randn(3, 2, 24)
    close(torch.func.vmap(layer(model))(batch), layer(model)(batch))
    assert report.calls() == {FAST: 1, "torch.func transforms": 1}

    class Wrapped(torch.Tensor):
        pass

    layer(model)(batch.as_subclass(Wrapped))
    assert report.calls()["a Wrapped among the tensors"] == 1
