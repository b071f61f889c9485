"""Adapters of a layer: added, switched, deleted, scaled, refused."""

import math

import pytest
import torch
from kinds import every_dense_kind
from layer_case import layer
from torch import nn

from lora_kernels import lora_linear

pytestmark = every_dense_kind
BAD_ALPHAS = (-4, 0, 0.0, math.nan, math.inf, -math.inf, "16", None, True, [16], 10**400)


def test_scaling(kind):
    assert layer(r=4, lora_alpha=6).adapters["default"].scaling == 1.5
    assert layer(r=4, lora_alpha=6, use_rslora=True).adapters["default"].scaling == 3.0


def test_scaling_may_become_a_tensor(kind):
    made, x = layer(), torch.randn(3, 12)
    expected = made(x)
    made.adapters["default"].scaling = torch.tensor(1.5)
    assert torch.equal(made(x), expected)
    made.adapters["default"].scaling.fill_(0.0)
    assert torch.allclose(made(x), nn.functional.linear(x, made.weight, made.bias), atol=1e-6)
    made.merge()
    assert torch.equal(made.weight, made._unmerged[0])


def test_adapters_are_switched(kind, device):
    made, x = layer(device=device), torch.randn(3, 12, device=device)
    made.add_adapter("other", 2, 4, init_lora_weights=False)
    first = made(x)
    assert not made.lora_A["other"].requires_grad, "an adapter that is not active is frozen"
    made.set_adapter("other")
    assert torch.allclose(
        made(x), lora_linear(x, made.weight, made.lora_A["other"], made.lora_B["other"], made.bias, scaling=2.0)
    )
    assert made.lora_A["other"].requires_grad
    assert not made.lora_A["default"].requires_grad
    made.set_adapter(None)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    made.set_adapter("default")
    assert torch.equal(made(x), first)
    made.delete_adapter("default")
    assert made.active_adapter is None
    assert sorted(made.state_dict()) == ["bias", "lora_A.other", "lora_B.other", "weight"]


def test_a_matrix_frozen_on_purpose_stays_frozen(kind):
    made = layer()
    made.lora_A["default"].requires_grad_(False)
    made.set_adapter(None)
    made.set_adapter("default")
    assert not made.lora_A["default"].requires_grad
    assert made.lora_B["default"].requires_grad


def test_only_adapter_of_a_rewritten_weight(kind):
    made = layer(init_lora_weights="pissa", trained=False)
    with pytest.raises(ValueError, match="must be the layer's only adapter"):
        made.add_adapter("other", 2, 4)
    original = made.to_linear().weight.clone()
    made.delete_adapter("default")
    assert torch.allclose(made.weight, original)
    made.add_adapter("other", 2, 4)
    with pytest.raises(ValueError, match="must be the layer's only adapter"):
        made.add_adapter("third", 2, 4, init_lora_weights="olora")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "default"}, "name: got 'default', expected a new name"),
        ({"name": "a.b"}, "name: got 'a.b'"),
        ({"name": ""}, "name: got ''"),
        ({"r": 0}, "r: got 0, expected an integer of at least 1"),
        *(({"lora_alpha": alpha}, "lora_alpha: got .*, expected a finite number above 0") for alpha in BAD_ALPHAS),
        ({"r": 2.0}, "r: got 2.0"),
        ({"lora_dropout": 1.1}, "lora_dropout: got 1.1"),
        ({"init_lora_weights": "gausian"}, "init_lora_weights: got 'gausian', expected one of True"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r: got 3, expected an even rank"),
        ({"init_lora_weights": "pissa", "r": 11}, "r: got 11, expected at most 10"),
    ],
)
def test_bad_adapters_change_nothing(kind, arguments, words):
    made = layer()
    before = sorted(made.state_dict())
    with pytest.raises(ValueError, match=words):
        made.add_adapter(**{"name": "new", "r": 2, "lora_alpha": 2, **arguments})
    assert sorted(made.state_dict()) == before
    assert list(made.adapters) == ["default"]


def test_unknown_adapter(kind):
    made = layer()
    for action in (made.set_adapter, made.delete_adapter, made.reset_lora_parameters):
        with pytest.raises(KeyError, match=r"adapter 'x': not found; adapters here: \['default'\]"):
            action("x")
