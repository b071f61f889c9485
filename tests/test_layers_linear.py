"""LoRALinear: the equation, conversions from and to plain layers, copies, agreement with PEFT's layer."""

import copy
import pickle

import pytest
import torch
from accuracy import errors
from kinds import every_dense_kind
from layer_case import DTYPES, dense, layer
from torch import nn

from lora_kernels import LoRALinear, lora_linear

pytestmark = every_dense_kind


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_equation(kind, dtype, device):
    made = layer(dtype, device).eval()
    x = torch.randn(5, 12, device=device, dtype=dtype)
    exact = (x.double() @ dense(made).T + made.bias.double()).cpu()
    assert errors(made(x), exact)[0] < torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 8)


def test_dropout_only_in_training(kind, device):
    made = layer(device=device, lora_dropout=0.5)
    x = torch.randn(5, 12, device=device)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))
    torch.manual_seed(1)
    expected = lora_linear(
        x, made.weight, made.lora_A["default"], made.lora_B["default"], made.bias, scaling=1.5, dropout_p=0.5
    )
    torch.manual_seed(1)
    assert torch.equal(made.train()(x), expected)


def test_only_the_adapter_is_trainable(kind):
    made = layer(bias=True)
    assert sorted(name for name, p in made.named_parameters() if p.requires_grad) == ["lora_A.default", "lora_B.default"]
    assert sorted(made.state_dict()) == ["bias", "lora_A.default", "lora_B.default", "weight"]
    made(torch.randn(3, 12)).sum().backward()
    assert made.weight.grad is None


def test_from_linear_shares_and_freezes(kind):
    linear = nn.Linear(12, 10).eval()
    made = LoRALinear.from_linear(linear, r=3)
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert not made.training
    assert not linear.weight.requires_grad
    assert made.adapters["default"].lora_alpha == 8  # the constructor's default
    x = torch.randn(2, 12)
    assert torch.equal(made(x), linear(x))


def test_from_linear_keeps_hooks(kind):
    linear = nn.Linear(12, 10)
    handle = linear.register_forward_hook(lambda module, args, output: output * 0)
    made = LoRALinear.from_linear(linear, r=3)
    assert not made(torch.ones(1, 12)).any()
    handle.remove()
    assert made(torch.ones(1, 12)).any()


def test_from_linear_refuses_other_layers(kind):
    with pytest.raises(TypeError, match=r"linear: got Embedding, expected nn\.Linear"):
        LoRALinear.from_linear(nn.Embedding(3, 4))
    with pytest.raises(TypeError, match="linear: got Conv1D, expected"):  # another one than transformers'
        LoRALinear.from_linear(type("Conv1D", (nn.Module,), {})())


def test_conv1d(kind):
    """transformers' Conv1D stores [in, out]; the parameter keeps that layout and name."""
    from transformers.pytorch_utils import Conv1D

    linear = Conv1D(10, 12)
    made = LoRALinear.from_linear(linear, r=4, init_lora_weights=False)
    x = torch.randn(3, 12, requires_grad=True)
    assert made.weight is linear.weight
    assert (made.in_features, made.out_features) == (12, 10)
    exact = x.double() @ dense(made).T + made.bias.double()
    assert torch.allclose(made(x).double(), exact, atol=1e-6)
    (dx,) = torch.autograd.grad(made(x).sum(), x)
    assert torch.allclose(dx.double(), dense(made).sum(0).expand(3, 12), atol=1e-5)
    made.eval().merge()
    assert made.weight.shape == (12, 10)
    assert torch.allclose(made(x).double(), exact, atol=1e-6)
    made.unmerge()
    assert made.weight is linear.weight
    assert type(made.to_linear()) is Conv1D


def test_a_base_checkpoint_loads_unchanged(kind):
    linear, made = nn.Linear(12, 10), layer()
    result = made.load_state_dict(linear.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A.default", "lora_B.default"]
    assert result.unexpected_keys == []
    assert torch.equal(made.weight, linear.weight)


@pytest.mark.parametrize("merged", [False, True])
def test_dtype_conversions(kind, merged):
    made = layer().eval()
    x = torch.randn(3, 12)
    expected = made(x)
    if merged:
        made.merge()
    wide = kind.dtypes[-1]
    assert torch.allclose(made.to(wide)(x.to(wide)).float(), expected, atol=1e-5)
    assert torch.allclose(made.half()(x.half()).float(), expected, atol=0.05)
    if merged:
        made.unmerge()
        assert made.weight.dtype == torch.float16
        assert torch.allclose(made(x.half()).float(), expected, atol=0.05)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("init", [True, "olora"])
def test_copies(kind, clone, init):
    made, x = layer(init_lora_weights=init), torch.randn(3, 12)
    made.merge()
    other = clone(made)
    other.unmerge()
    made.unmerge()
    assert torch.equal(other(x), made(x))
    nn.init.zeros_(other.lora_B["default"])
    assert not torch.equal(other(x), made(x))
    assert torch.equal(other.to_linear().weight, made.to_linear().weight)


def test_state_dict_round_trip(kind, tmp_path):
    made, other, x = layer(), layer(), torch.randn(3, 12)
    torch.save(made.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x), made(x))


def test_to_linear(kind):
    made, x = layer(), torch.randn(3, 12)
    plain = made.to_linear()
    assert type(plain) is nn.Linear
    assert plain.weight is made.weight
    made.eval().merge()
    assert torch.equal(made.to_linear()(x), made(x))


def test_repr_names_the_adapters(kind):
    assert "default: r=4, lora_alpha=6" in repr(layer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_peft(kind, dtype):
    """Same numbers as PEFT's layer without dropout: outputs and gradients within rounding."""
    peft = pytest.importorskip("peft")
    linear = nn.Linear(48, 40, dtype=dtype)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config, autocast_adapter_dtype=False)
    theirs = model.base_model.model[0]
    ours = LoRALinear.from_linear(linear, r=4, lora_alpha=6)
    ours.lora_A["default"].data.copy_(theirs.lora_A["default"].weight)
    ours.lora_B["default"].data.copy_(theirs.lora_B["default"].weight)
    x, dy = torch.randn(9, 48, dtype=dtype, requires_grad=True), torch.randn(9, 40, dtype=dtype)
    mine = torch.autograd.grad(ours(x), [x, ours.lora_A["default"], ours.lora_B["default"]], dy)
    adapters = [theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    for a, b in zip(mine, torch.autograd.grad(theirs(x), [x, *adapters], dy), strict=True):
        assert errors(a, b.double())[0] < 4 * torch.finfo(dtype).eps
    assert errors(ours(x), theirs(x).double())[0] < 2 * torch.finfo(dtype).eps


def test_compiles_as_one_graph(kind):
    torch._dynamo.reset()
    made, x = layer(lora_dropout=0.2), torch.randn(3, 12)
    made.eval()
    assert torch.allclose(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x), atol=1e-6)
