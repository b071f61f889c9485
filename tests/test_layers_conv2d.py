"""LoRAConv2d and LoRAEmbedding: made, trained, merged, saved and made plain layers again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels import LoRAConv2d, LoRAEmbedding, dropout_mask
from lora_kernels.mask import keep_scale

X, IDS = torch.randn(2, 6, 9, 8), torch.tensor([[1, 0, 2], [2, 2, 9]])


def conv(**options):
    return nn.Conv2d(6, 10, 3, **{"padding": 1, **options})


def filled(layer):
    """The layer with adapters that are not zero."""
    for parameter in layer.adapter_parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def layers():
    """(layer, x) of each kind, with adapters that are not zero."""
    yield filled(LoRAConv2d(6, 10, 3, stride=2, padding=(1, 0), dilation=2, r=4, lora_bias=True)), X
    yield filled(LoRAConv2d(6, 10, 1, bias=False, r=4)), X
    yield filled(LoRAEmbedding(10, 6, 0, r=4)), IDS


def test_a_fresh_adapter_changes_nothing_and_shares_the_weight():
    for kind, make, source, x in (
        ("Conv2d", LoRAConv2d.from_conv, conv().eval(), X),
        ("Embedding", LoRAEmbedding.from_embedding, nn.Embedding(10, 6).eval(), IDS),
    ):
        expected, weight = source(x), source.weight
        layer = make(source, r=4, lora_alpha=2, lora_dropout=0.5)
        assert layer.weight is weight
        assert not weight.requires_grad
        assert not layer.training
        assert torch.equal(layer(x), expected)
        assert layer.adapters["default"].scaling == 0.5
        assert layer.to_plain() is source
        assert kind in repr(layer)
        assert "r=4" in repr(layer)


def test_padding_same_and_other_options_of_conv2d():
    for options in ({"padding": "same", "dilation": 2}, {"padding": "valid"}, {"stride": 2, "padding": (0, 2)}):
        source = conv(**options)
        layer = LoRAConv2d.from_conv(source, init_lora_weights=False, lora_alpha=3)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        own = {"stride": source.stride, "padding": source.padding, "dilation": source.dilation}
        expected = source(X) + 3 / 8 * F.conv2d(F.conv2d(X, A, **own), B)
        torch.testing.assert_close(layer(X), expected)


@pytest.mark.parametrize("position", ["x", "h"])
def test_dropout_in_training_alone(position, monkeypatch):
    seed = torch.tensor(5)
    monkeypatch.setattr("lora_kernels.operation.definition.draw_seed", lambda device: seed)
    layer = filled(LoRAConv2d.from_conv(conv(), r=4, lora_alpha=4, lora_dropout=0.4, dropout_position=position))
    A, B = layer.lora_A["default"], layer.lora_B["default"]

    def drop(v):
        pixels = v.permute(0, 2, 3, 1)
        keep = dropout_mask(pixels[..., 0].numel(), v.shape[1], 0.4, seed).view(pixels.shape).permute(0, 3, 1, 2)
        return v * keep * keep_scale(0.4)

    h = F.conv2d(drop(X), A, padding=1) if position == "x" else drop(F.conv2d(X, A, padding=1))
    base = F.conv2d(X, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(X), base + F.conv2d(h, B))
    torch.testing.assert_close(layer.eval()(X), base + F.conv2d(F.conv2d(X, A, padding=1), B))


def test_merge_and_its_exact_inverse():
    for layer, x in layers():
        layer.eval()
        before, weight, y = layer.state_dict(), layer.weight, layer(x)
        layer.merge()
        assert layer.weight is not weight
        assert layer.weight.shape == weight.shape
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError, match=f"cannot merge again: {type(layer).__name__} is merged"):
            layer.merge()
        with pytest.raises(RuntimeError, match="gets no gradient"):
            layer.train()(x)
        plain = copy.deepcopy(layer).eval().to_plain()
        torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)
        layer.eval().unmerge()
        assert layer.weight is weight
        assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
        assert torch.equal(layer(x), y)


def test_merging_keeps_the_memory_format():
    layer = filled(LoRAConv2d(6, 10, 3, r=4)).to(memory_format=torch.channels_last).eval()
    x = X.contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    layer.merge()
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    layer.reset_lora_parameters("default")
    assert layer.lora_A["default"].abs().sum() > 0
    assert not layer.lora_B["default"].any()


def test_state_dicts_and_copies():
    for (layer, x), (other, _) in zip(layers(), layers(), strict=True):
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
        assert {"weight", "lora_A.default", "lora_B.default"} <= layer.state_dict().keys()


def test_several_adapters():
    for layer, x in layers():
        y = layer(x)
        layer.add_adapter("other", 2, 2)
        assert torch.equal(layer(x), y)
        layer.set_adapter("other")
        assert [p.requires_grad for p in (layer.lora_A["default"], layer.lora_A["other"])] == [False, True]
        base = layer(x)
        layer.set_adapter(None)
        torch.testing.assert_close(layer(x), base)
        layer.delete_adapter("other")
        assert list(layer.adapters) == ["default"]


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_initialisations_leave_the_function(init):
    source = conv()
    expected, weight = source(X), source.weight
    layer = LoRAConv2d.from_conv(source, r=4, init_lora_weights=init)
    assert layer.lora_A["default"].any()
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)
    layer.set_adapter(None)
    torch.testing.assert_close(layer(X), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.to_plain().weight, weight)


def test_pefts_initialisation_of_an_embedding():
    layer = LoRAEmbedding(1000, 64, r=8)
    assert not layer.lora_A["default"].any()
    assert 0.9 < layer.lora_B["default"].std() < 1.1
    assert LoRAEmbedding(10, 6, init_lora_weights=False).lora_A["default"].any()


def test_on_the_meta_device():
    for layer in (LoRAConv2d(6, 10, 3, device="meta"), LoRAEmbedding(10, 6, 0, device="meta")):
        layer.to_empty(device="cpu").reset_parameters()
        assert layer.weight.isfinite().all()
        assert layer(X if isinstance(layer, LoRAConv2d) else IDS).isfinite().all()


REFUSED = {
    "groups": (LoRAConv2d.from_conv, nn.Conv2d(6, 6, 3, groups=6), {}, ValueError, r"grouped Conv2d \(groups=6\): a rank"),
    "padding_mode": (LoRAConv2d.from_conv, conv(padding_mode="reflect"), {}, ValueError, "padding_mode='reflect'"),
    "conv1d": (LoRAConv2d.from_conv, nn.Conv1d(6, 6, 3), {}, TypeError, "conv: got Conv1d, expected nn.Conv2d"),
    "dora": (LoRAConv2d.from_conv, conv(), {"use_dora": True}, ValueError, "use_dora: got True, expected False for a Conv2d"),
    "adalora": (LoRAConv2d.from_conv, conv(), {"use_adalora": True}, ValueError, "use_adalora: got True"),
    "position": (LoRAConv2d.from_conv, conv(), {"dropout_position": "y"}, ValueError, "dropout_position: got 'y'"),
    "rank": (LoRAConv2d.from_conv, conv(), {"r": 0}, ValueError, "r: got 0"),
    "max_norm": (LoRAEmbedding.from_embedding, nn.Embedding(9, 4, max_norm=1.0), {}, ValueError, "max_norm=1.0, which"),
    "sparse": (LoRAEmbedding.from_embedding, nn.Embedding(9, 4, sparse=True), {}, ValueError, "sparse=True"),
    "frequency": (LoRAEmbedding.from_embedding, nn.Embedding(9, 4, scale_grad_by_freq=True), {}, ValueError, "by_freq"),
    "bag": (LoRAEmbedding.from_embedding, nn.EmbeddingBag(9, 4), {}, TypeError, "got EmbeddingBag"),
    "bias": (LoRAEmbedding.from_embedding, nn.Embedding(9, 4), {"lora_bias": True}, ValueError, "lora_bias: got True"),
    "pissa": (LoRAEmbedding.from_embedding, nn.Embedding(9, 4), {"init_lora_weights": "pissa"}, ValueError, "got 'pissa'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, source, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make(source, **options)
    assert all(parameter.requires_grad for parameter in source.parameters())
