"""Initial values of adapters: the layer's function stays, PEFT's values, distributions, resetting."""

import copy

import pytest
import torch
from kinds import every_dense_kind
from layer_case import layer
from torch import nn

from lora_kernels import LoRALinear

pytestmark = every_dense_kind

INITS = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora"]


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_initialisation_leaves_the_function_unchanged(kind, init, dtype):
    linear = nn.Linear(12, 10, dtype=dtype)
    x = torch.randn(5, 12, dtype=dtype)
    expected = linear(x)
    made = LoRALinear.from_linear(linear, r=4, lora_alpha=6, init_lora_weights=init)
    tolerance = 8 * torch.finfo(dtype).eps
    assert torch.allclose(made(x), expected, rtol=tolerance, atol=tolerance)
    made.set_adapter(None)
    assert torch.allclose(made(x), expected, rtol=tolerance, atol=tolerance), "the base layer is the original one"
    assert torch.allclose(linear(x), expected, rtol=0, atol=0), "a shared weight was written to"


@pytest.mark.parametrize("init", [False, "orthogonal", "pissa", "olora"])
def test_initialisation_is_pefts(kind, init):
    """From the same random numbers or the same weight, up to the signs of singular vectors."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(12, 10)
    model = nn.Sequential(copy.deepcopy(linear))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=init)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    torch.manual_seed(1)
    ours = LoRALinear.from_linear(linear, r=4, lora_alpha=6, init_lora_weights=init)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    assert torch.allclose(ours.lora_B["default"] @ ours.lora_A["default"], B @ A, atol=1e-6)
    assert torch.allclose(ours.weight, theirs.base_layer.weight, atol=1e-6)


def test_random_initialisations(kind):
    """Kaiming-uniform is uniform in ±1/√K, "gaussian" has the deviation 1/r; a sketched PiSSA is near the exact one."""
    A = LoRALinear(400, 10, r=16).lora_A["default"]
    assert A.abs().max() <= 400**-0.5
    assert A.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    A = LoRALinear(400, 10, r=16, init_lora_weights="gaussian").lora_A["default"]
    assert A.std().item() == pytest.approx(1 / 16, rel=0.05)
    linear = nn.Linear(40, 30)
    exact, sketched = (LoRALinear.from_linear(linear, r=4, init_lora_weights=init) for init in ("pissa", "pissa_niter_16"))
    assert sketched.weight.norm() < 1.02 * exact.weight.norm(), "the residual of the best approximation is the smallest"


def test_reset_lora_parameters(kind):
    for init in INITS:
        made = layer(init_lora_weights=init)
        x = torch.randn(3, 12)
        base = nn.functional.linear(x, made.to_linear().weight, made.bias)
        made.reset_lora_parameters("default")
        if init is not False:
            assert torch.allclose(made(x), base, atol=1e-5)


def test_meta_device_then_materialised(kind):
    made = LoRALinear(12, 10, r=4, device="meta")
    assert made.weight.is_meta
    assert made.lora_A["default"].is_meta
    made.to_empty(device="cpu").reset_parameters()
    assert not made.lora_B["default"].any()
    assert made.lora_A["default"].any()
    with pytest.raises(ValueError, match="weight on the meta device, whose values it needs"):
        LoRALinear(12, 10, r=4, device="meta", init_lora_weights="pissa")
