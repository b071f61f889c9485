"""PEFT's lora.Conv2d and lora.Embedding accelerated, and diffusers' UNet: outputs, gradients and merged weights are PEFT's."""

import copy
import warnings

import pytest
import torch
from accuracy import violations
from peft import LoraConfig, get_peft_model
from torch import nn
from unet_case import TARGETS, batch, fill, place, step, unet

from lora_kernels import LoRAConfig, accelerate, accelerated, add_lora, dropout_mask, merge_lora, restore
from lora_kernels.mask import keep_scale

SEED = 11
FAST = "fast"
X, IDS = torch.randn(2, 6, 7, 8), torch.tensor([[1, 0, 2], [2, 2, 9]])
CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "bias": False},
    "same": {"kernel_size": 4, "padding": "same"},
    "1x1": {"kernel_size": 1},
    "1x1, strided": {"kernel_size": 1, "stride": 2},
}


class FixedMask(nn.Module):
    """lora_conv2d's dropout, or lora_linear's, with a known seed, for PEFT's own forward."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        last = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        keep = dropout_mask(last[..., 0].numel(), last.shape[-1], self.p, SEED).view(last.shape)
        return x * (keep.permute(0, 3, 1, 2) if x.ndim == 4 else keep) * keep_scale(self.p)


def same_masks(model, monkeypatch):
    """Let PEFT's layers drop what ours do, whose seeds are all one."""
    monkeypatch.setattr("lora_kernels.operation.definition.draw_seed", lambda device: torch.tensor(SEED))
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[name] = FixedMask(dropout.p)


def peft_layer(layer, dtype=torch.float32, **options):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False, **options})
    return get_peft_model(nn.Sequential(layer).to(dtype), config)


def results(model, x):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    leaves = [*trained.values(), x] if x.requires_grad else [*trained.values()]
    y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return {"y": y.detach(), **dict(zip([*trained, "x"], torch.autograd.grad(y, leaves, dy), strict=False))}


def check(plain, x, dtype, monkeypatch, autocast=None):
    """The rule against PEFT's own layer, and PEFT's dtypes."""
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    assert report.accelerated == ["base_model.model.0"]
    same_masks(plain, monkeypatch)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        tested, expected = results(ours, x), results(plain, x)
    wide = x.detach().double().requires_grad_() if x.requires_grad else x
    exact = results(copy.deepcopy(plain).double(), wide)
    assert report.calls() == {FAST: 1}
    assert {name: t.dtype for name, t in tested.items()} == {name: t.dtype for name, t in expected.items()}
    assert not (lines := violations(tested, expected, exact, autocast or dtype)), lines


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_conv2d(name, dtype, p, monkeypatch):
    plain = peft_layer(nn.Conv2d(6, 9, **CONVS[name]), dtype, lora_dropout=p)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = X.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        check(copy.deepcopy(plain), x, dtype, monkeypatch)


def test_conv2d_with_a_bias_of_its_own_and_under_autocast(monkeypatch):
    x = X.clone().requires_grad_()
    check(peft_layer(nn.Conv2d(6, 9, 3), lora_bias=True, use_rslora=True), x, torch.float32, monkeypatch)
    check(peft_layer(nn.Conv2d(6, 9, 3), lora_dropout=0.3), x, torch.float32, monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(padding_idx, dtype, monkeypatch):
    check(peft_layer(nn.Embedding(10, 6, padding_idx), dtype, lora_dropout=0.3), IDS, dtype, monkeypatch)


def conv(**options):
    return peft_layer(nn.Conv2d(6, 6, 3, **options), lora_dropout=0.1)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_computes_itself():
    hooked, merged, off = conv(), conv().eval(), conv().eval()
    hooked.base_model.model[0].lora_B["default"].register_forward_hook(lambda *_: None)
    merged.merge_adapter()
    off.base_model.disable_adapter_layers()
    cases = {
        "grouped": (conv(groups=2), "a grouped Conv2d"),
        "dilated": (conv(dilation=2, padding="same"), "another stride, padding or dilation"),
        "padded": (conv(padding=1, padding_mode="circular"), "padding_mode='circular'"),
        "hooks": (hooked, "lora_B has hooks"),
        "merged": (merged, "adapters are merged"),
        "disabled": (off, "adapters are disabled"),
        "dora": (peft_layer(nn.Conv2d(6, 6, 3), use_dora=True), "the variant DoraConv2dVariant"),
        "max_norm": (peft_layer(nn.Embedding(10, 6, max_norm=1.0)), "max_norm"),
        "dora embedding": (peft_layer(nn.Embedding(10, 6), use_dora=True), "the variant DoraEmbeddingVariant"),
    }
    for name, (model, reason) in cases.items():
        x = IDS if isinstance(model.base_model.model[0].get_base_layer(), nn.Embedding) else X
        torch.manual_seed(1)
        expected = model(x)
        report = accelerate(model)
        assert reason in report.falling_back["base_model.model.0"], name
        torch.manual_seed(1)
        assert torch.equal(model(x), expected), name
        assert report.calls()[FAST] == 0, name


def test_an_unbatched_picture_and_names_of_adapters_go_to_peft():
    model = conv().eval()
    report = accelerate(model)
    torch.testing.assert_close(model(X[0]), model(X[:1])[0])
    model(X, adapter_names=["default", "__base__"])
    assert report.calls() == {FAST: 1, "x is not [n, in_channels, ·, ·]": 1, "extra arguments": 1}


def test_peft_goes_on_with_the_layers():
    """Merging, unmerging, further adapters, state dicts and restore are PEFT's own methods."""
    model = conv().eval()
    keys, y = model.state_dict().keys(), model(X)
    accelerate(model)
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(model(X), y)
    model.merge_adapter()
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    model.set_adapter("other")
    assert model(X).isfinite().all()
    restore(model)
    assert type(model.base_model.model[0]).__module__.startswith("peft.")


# ---- diffusers' UNet ----


def peft_unet(dtype, p, make=lambda config: config):
    model = get_peft_model(unet(dtype), make(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=p)))
    fill(model)
    return model


def own_unet(dtype, p):
    model = unet(dtype)
    add_lora(model, LoRAConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=p))
    fill(model)
    return model


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_training_step_of_a_unet_is_peft_s_in_float64(p, monkeypatch):
    dtype = torch.float64
    plain = peft_unet(dtype, p)
    ours, fast = own_unet(dtype, p), copy.deepcopy(plain)
    report = accelerate(fast, blocks=not p)  # the members of a block have masks of their own
    same_masks(plain, monkeypatch)
    (y, grads), (y1, own), (y2, accelerated_grads) = (step(model, dtype) for model in (plain, ours, fast))
    torch.testing.assert_close(y1, y)
    torch.testing.assert_close(y2, y)
    expected = {place(name): grad for name, grad in grads.items()}
    assert len(expected) == 2 * len(report.accelerated) > 50
    assert set(report.calls()) == {FAST}
    for found in (own, accelerated_grads):
        assert {place(name) for name in found} == set(expected)
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[place(name)])


def test_merged_weights_of_a_unet_are_peft_s():
    ours, plain = own_unet(torch.float32, 0.0), peft_unet(torch.float32, 0.0)
    merge_lora(ours)
    merged = plain.merge_and_unload().state_dict()
    for name, value in ours.state_dict().items():
        if "lora_" not in name:
            torch.testing.assert_close(value, merged[name])


def test_a_config_makes_accelerated_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft_unet(torch.float32, 0.1, accelerated)
    names = {type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Accelerated")}
    assert names == {"AcceleratedLinear", "AcceleratedConv2d"}
    assert model(*batch()).sample.isfinite().all()
