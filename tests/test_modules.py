"""LoRALinear: one layer, its adapters, merging, conversions, agreement with PEFT's layer."""

import copy
import pickle

import pytest
import torch
from accuracy import errors
from torch import nn

from lora_kernels import LoRALinear, lora_linear

pytestmark = pytest.mark.usefixtures("backend")
INITS = [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def layer(dtype=torch.float32, device="cpu", trained=True, **options):
    options = {"r": 4, "lora_alpha": 6, **options}
    made = LoRALinear(12, 10, device=device, dtype=dtype, **options)
    if trained:
        nn.init.normal_(made.lora_B["default"])
    return made


def dense(made, name="default"):
    """W + s·B·A in float64."""
    adapter = made.adapters[name]
    A, B = made.lora_A[name].double(), made.lora_B[name].double()
    return made.matrix.double() + adapter.scaling * B @ A


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_equation(dtype, device):
    made = layer(dtype, device).eval()
    x = torch.randn(5, 12, device=device, dtype=dtype)
    exact = (x.double() @ dense(made).T + made.bias.double()).cpu()
    assert errors(made(x), exact)[0] < torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 8)


def test_dropout_only_in_training(device):
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


def test_only_the_adapter_is_trainable():
    made = layer(bias=True)
    assert sorted(name for name, p in made.named_parameters() if p.requires_grad) == ["lora_A.default", "lora_B.default"]
    assert sorted(made.state_dict()) == ["bias", "lora_A.default", "lora_B.default", "weight"]
    made(torch.randn(3, 12)).sum().backward()
    assert made.weight.grad is None


def test_scaling():
    assert layer(r=4, lora_alpha=6).adapters["default"].scaling == 1.5
    assert layer(r=4, lora_alpha=6, use_rslora=True).adapters["default"].scaling == 3.0


def test_scaling_may_become_a_tensor():
    made, x = layer(), torch.randn(3, 12)
    expected = made(x)
    made.adapters["default"].scaling = torch.tensor(1.5)
    assert torch.equal(made(x), expected)
    made.adapters["default"].scaling.fill_(0.0)
    assert torch.allclose(made(x), nn.functional.linear(x, made.weight, made.bias), atol=1e-6)
    made.merge()
    assert torch.equal(made.weight, made._unmerged[0])


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(12, 10).eval()
    made = LoRALinear.from_linear(linear, r=3)
    assert made.weight is linear.weight
    assert made.bias is linear.bias
    assert not made.training
    assert not linear.weight.requires_grad
    assert made.adapters["default"].lora_alpha == 8  # the constructor's default
    x = torch.randn(2, 12)
    assert torch.equal(made(x), linear(x))


def test_from_linear_keeps_hooks():
    linear = nn.Linear(12, 10)
    handle = linear.register_forward_hook(lambda module, args, output: output * 0)
    made = LoRALinear.from_linear(linear, r=3)
    assert not made(torch.ones(1, 12)).any()
    handle.remove()
    assert made(torch.ones(1, 12)).any()


def test_from_linear_refuses_other_layers():
    with pytest.raises(TypeError, match=r"linear: got Embedding, expected nn\.Linear"):
        LoRALinear.from_linear(nn.Embedding(3, 4))


def test_conv1d():
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


def test_a_base_checkpoint_loads_unchanged():
    linear, made = nn.Linear(12, 10), layer()
    result = made.load_state_dict(linear.state_dict(), strict=False)
    assert result.missing_keys == ["lora_A.default", "lora_B.default"]
    assert result.unexpected_keys == []
    assert torch.equal(made.weight, linear.weight)


# ---- initialisation ----


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "pissa_niter_8", "olora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_initialisation_leaves_the_function_unchanged(init, dtype):
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
def test_initialisation_is_pefts(init):
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


def test_random_initialisations():
    """Kaiming-uniform is uniform in ±1/√K, "gaussian" has the deviation 1/r; a sketched PiSSA is near the exact one."""
    A = LoRALinear(400, 10, r=16).lora_A["default"]
    assert A.abs().max() <= 400**-0.5
    assert A.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.05)
    A = LoRALinear(400, 10, r=16, init_lora_weights="gaussian").lora_A["default"]
    assert A.std().item() == pytest.approx(1 / 16, rel=0.05)
    linear = nn.Linear(40, 30)
    exact, sketched = (LoRALinear.from_linear(linear, r=4, init_lora_weights=init) for init in ("pissa", "pissa_niter_16"))
    assert sketched.weight.norm() < 1.02 * exact.weight.norm(), "the residual of the best approximation is the smallest"


def test_reset_lora_parameters():
    for init in INITS:
        made = layer(init_lora_weights=init)
        x = torch.randn(3, 12)
        base = nn.functional.linear(x, made.to_linear().weight, made.bias)
        made.reset_lora_parameters("default")
        if init is not False:
            assert torch.allclose(made(x), base, atol=1e-5)


def test_meta_device_then_materialised():
    made = LoRALinear(12, 10, r=4, device="meta")
    assert made.weight.is_meta
    assert made.lora_A["default"].is_meta
    made.to_empty(device="cpu").reset_parameters()
    assert not made.lora_B["default"].any()
    assert made.lora_A["default"].any()
    with pytest.raises(ValueError, match="weight on the meta device, whose values it needs"):
        LoRALinear(12, 10, r=4, device="meta", init_lora_weights="pissa")


# ---- several adapters ----


def test_adapters_are_switched(device):
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


def test_a_matrix_frozen_on_purpose_stays_frozen():
    made = layer()
    made.lora_A["default"].requires_grad_(False)
    made.set_adapter(None)
    made.set_adapter("default")
    assert not made.lora_A["default"].requires_grad
    assert made.lora_B["default"].requires_grad


def test_only_adapter_of_a_rewritten_weight():
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
        ({"r": 2.0}, "r: got 2.0"),
        ({"lora_dropout": 1.1}, "lora_dropout: got 1.1"),
        ({"init_lora_weights": "gausian"}, "init_lora_weights: got 'gausian', expected one of True"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "r: got 3, expected an even rank"),
        ({"init_lora_weights": "pissa", "r": 11}, "r: got 11, expected at most 10"),
    ],
)
def test_bad_adapters_change_nothing(arguments, words):
    made = layer()
    before = sorted(made.state_dict())
    with pytest.raises(ValueError, match=words):
        made.add_adapter(**{"name": "new", "r": 2, "lora_alpha": 2, **arguments})
    assert sorted(made.state_dict()) == before
    assert list(made.adapters) == ["default"]


def test_unknown_adapter():
    made = layer()
    for action in (made.set_adapter, made.delete_adapter, made.reset_lora_parameters):
        with pytest.raises(KeyError, match=r"adapter 'x': not found; adapters here: \['default'\]"):
            action("x")


# ---- merging ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [True, "pissa"])
def test_merge_and_unmerge(dtype, init):
    made = layer(dtype, init_lora_weights=init, trained=False).eval()
    nn.init.normal_(made.lora_B["default"], std=0.1)
    before, parameter = made.weight.clone(), made.weight
    exact = dense(made)
    made.merge()
    assert made.merged
    assert torch.equal(made.weight, exact.to(dtype)) or errors(made.weight, exact)[1] <= torch.finfo(dtype).eps
    x = torch.randn(5, 12, dtype=dtype)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    made.unmerge()
    assert made.weight is parameter
    assert torch.equal(made.weight, before), "unmerging is bit-exact in every dtype"


def test_errors_while_merged():
    made = layer()
    made.merge()
    for action in (made.merge, lambda: made.set_adapter(None), lambda: made.delete_adapter("default"), made.reset_parameters):
        with pytest.raises(RuntimeError, match=r"LoRALinear is merged; call unmerge\(\) first"):
            action()
    with pytest.raises(RuntimeError, match="merged, so its adapter gets no gradient"):
        made(torch.ones(1, 12))
    with torch.no_grad():
        made(torch.ones(1, 12))
    made.unmerge()
    with pytest.raises(RuntimeError, match="cannot unmerge: LoRALinear is not merged"):
        made.unmerge()
    made.set_adapter(None)
    with pytest.raises(RuntimeError, match="cannot merge: no adapter is active"):
        made.merge()


def test_merging_does_not_write_to_a_shared_weight():
    embedding, head = nn.Embedding(10, 12), nn.Linear(12, 10, bias=False)
    head.weight = embedding.weight
    made = LoRALinear.from_linear(head, r=2, init_lora_weights=False)
    before = embedding.weight.clone()
    made.merge()
    assert torch.equal(embedding.weight, before)
    made.unmerge()
    assert made.weight is embedding.weight


# ---- conversions ----


@pytest.mark.parametrize("merged", [False, True])
def test_dtype_conversions(merged):
    made = layer().eval()
    x = torch.randn(3, 12)
    expected = made(x)
    if merged:
        made.merge()
    assert torch.allclose(made.double()(x.double()).float(), expected, atol=1e-5)
    assert torch.allclose(made.half()(x.half()).float(), expected, atol=0.05)
    if merged:
        made.unmerge()
        assert made.weight.dtype == torch.float16
        assert torch.allclose(made(x.half()).float(), expected, atol=0.05)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
@pytest.mark.parametrize("init", [True, "olora"])
def test_copies(clone, init):
    made, x = layer(init_lora_weights=init), torch.randn(3, 12)
    made.merge()
    other = clone(made)
    other.unmerge()
    made.unmerge()
    assert torch.equal(other(x), made(x))
    nn.init.zeros_(other.lora_B["default"])
    assert not torch.equal(other(x), made(x))
    assert torch.equal(other.to_linear().weight, made.to_linear().weight)


def test_state_dict_round_trip(tmp_path):
    made, other, x = layer(), layer(), torch.randn(3, 12)
    torch.save(made.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x), made(x))


def test_to_linear():
    made, x = layer(), torch.randn(3, 12)
    plain = made.to_linear()
    assert type(plain) is nn.Linear
    assert plain.weight is made.weight
    made.eval().merge()
    assert torch.equal(made.to_linear()(x), made(x))


def test_repr_names_the_adapters():
    assert "default: r=4, lora_alpha=6" in repr(layer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_peft(dtype):
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


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    made, x = layer(lora_dropout=0.2), torch.randn(3, 12)
    made.eval()
    assert torch.allclose(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x), atol=1e-6)
