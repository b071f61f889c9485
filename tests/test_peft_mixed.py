"""PEFT's adapter_names= through accelerate, against PEFT's own loop; and mixed_adapters on PEFT's models, which trains."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_model import FAST
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import accelerate, mixed_adapters, restore

NAMES = ["b", "__base__", "a", "c", "a"]
OURS = [None if name == "__base__" else name for name in NAMES]


def build(conv1d=False, dropout=0.0, dtype=torch.float32, **options):
    """Three adapters of other ranks; "c" is in the last layer alone."""
    torch.manual_seed(0)
    first = Conv1D(96, 64) if conv1d else nn.Linear(64, 96)
    model, common = nn.Sequential(first, nn.GELU(), nn.Linear(96, 64)).to(dtype), {"init_lora_weights": False, **options}
    config = {name: LoraConfig(r=r, target_modules=targets, lora_dropout=dropout, **common) for name, r, targets in (
        ("a", 4, ["0", "2"]), ("b", 7, ["0", "2"]), ("c", 2, ["2"]))}  # fmt: skip
    model = get_peft_model(model, config["a"], "a")
    for name in "bc":
        model.add_adapter(name, config[name])
    return model


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,)])
def test_adapter_names_are_pefts_in_one_call(shape, dtype, conv1d):
    model, x = build(conv1d, dropout=0.5, dtype=dtype).eval(), torch.randn(5, *shape, 64).to(dtype)
    expected = model(x, adapter_names=NAMES)
    report = accelerate(model)
    found = model(x, adapter_names=NAMES)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-4)
    assert report.calls() == {FAST: 2}


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mixed_adapters_trains(fast, dropout):
    """Gradients are those of each adapter alone, by PEFT; which PEFT's adapter_names refuses in training."""
    model, x = build(dropout=dropout), torch.randn(5, 7, 64)
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=NAMES)
    expected = {}
    for name in ("a", "b", "c"):
        own = copy.deepcopy(model)
        own.set_adapter(name)
        rows = torch.stack([row for row, of in zip(x, NAMES, strict=True) if of == name])
        trained = {path: p for path, p in own.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(own(rows).square().sum(), list(trained.values()))
        expected |= dict(zip(trained, grads, strict=True))
    report = accelerate(model) if fast else None
    with mixed_adapters(model, OURS):
        model(x).square().sum().backward()
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for path, grad in expected.items() if not dropout else ():
        torch.testing.assert_close(found[path], grad, atol=1e-3, rtol=1e-4)
    if report is not None:
        assert report.calls() == {FAST: 2}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_has_more_than_a_and_b_is_pefts_own():
    model, x = build(lora_bias=True).eval(), torch.randn(5, 64)
    expected = model(x, adapter_names=NAMES)
    report = accelerate(model)
    assert torch.equal(model(x, adapter_names=NAMES), expected)
    assert report.calls() == {FAST: 0, "an adapter of a mixed batch has more than A and B": 2}


def test_pefts_errors_stay():
    model, x = build().eval(), torch.randn(5, 64)
    dora = build(use_dora=True).eval()
    for accelerated in (False, True):
        if accelerated:
            accelerate(model), accelerate(dora)
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): d"):
            model(x, adapter_names=["d"] * 5)
        with pytest.raises(ValueError, match="should be the same as the number of inputs"):
            model(x, adapter_names=["a"] * 4)
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            dora(x, adapter_names=["a"] * 5)
        model.merge_adapter(["a"])
        with pytest.raises(ValueError, match="when there are merged adapters"):
            model(x, adapter_names=NAMES)
        model.unmerge_adapter()
        unknown = r"adapter 'd': not found; adapters here: \['a', 'b', 'c'\]"
        with pytest.raises(KeyError, match=unknown), mixed_adapters(model, ["d"]):
            pass


def test_a_layer_with_none_of_them_is_pefts_base():
    model, x = build().eval(), torch.randn(2, 64)
    expected = model(x, adapter_names=["c", "__base__"])
    report = accelerate(model)
    assert torch.allclose(model(x, adapter_names=["c", "__base__"]), expected, atol=1e-5)
    assert report.calls() == {FAST: 1, "no adapter of a mixed batch is the layer's": 1}
    restore(model)
    assert torch.equal(model(x, adapter_names=["c", "__base__"]), expected)


def test_x_that_does_not_fit_is_pefts_own_error():
    model = build().eval()
    accelerate(model)
    for x in (torch.randn(5, 63), torch.ones(5, 64, dtype=torch.int64)):
        messages = []
        for _ in range(2):
            with pytest.raises(RuntimeError) as error:
                model(x, adapter_names=NAMES)
            messages.append(str(error.value))
            restore(model)
        assert messages[0] == messages[1]
        accelerate(model)


def test_an_adapter_of_another_dtype_is_pefts_own():
    model, x = build().eval(), torch.randn(5, 64)
    model.base_model.model[0].lora_A["b"].double(), model.base_model.model[0].lora_B["b"].double()
    expected = model(x, adapter_names=NAMES)
    report = accelerate(model)
    assert torch.allclose(model(x, adapter_names=NAMES), expected, atol=1e-5)
    assert report.calls() == {FAST: 1, "the adapters of a mixed batch differ in dtype": 1}
