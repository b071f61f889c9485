"""LoRALinear with AdaLoRA: the equation in float64, gradients, what is saved, and everything else that a layer does."""

import copy

import pytest
import torch
from layer_case import dense
from torch import nn
from transformers.pytorch_utils import Conv1D
from variant_case import check_equation

from lora_kernels import AdaLoRAConfig, LoRAConfig, LoRALinear, add_lora, lora_state_dict, merge_lora, set_adapter, unmerge_lora
from lora_kernels.layers import adapters

DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


def layer(dtype=torch.float32, adapter_dtype=None, K=24, N=33, r=5, base=None, **options):
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype) if base is None else base
    options = {"r": r, "lora_alpha": 7, "init_lora_weights": False, "use_adalora": True, **options}
    return LoRALinear.from_linear(linear, dtype=adapter_dtype, **options)


def tensors(made):
    return made.lora_A["default"], made.lora_B["default"], made.lora_E["default"]


def equation(x, W, c, A, B, E, drop):
    """y = x·Wᵀ + α/(r + 1e-5)·drop(x)·(E ⊙ A)ᵀ·Bᵀ + c."""
    scaling = 7 / (A.shape[0] + 1e-5)
    return x @ W.T + (scaling * (drop(x).to(A.dtype) @ (E * A).T @ B.T)).to(x.dtype) + c


def check(dtype, adapter_dtype, p):
    """Assert the one rule for a layer in training, PyTorch's own operations in float64 being the truth."""
    made = layer(dtype, adapter_dtype, lora_dropout=p)
    check_equation(made, tensors(made), "ABE", equation, p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_the_equation_under_the_rule(dtype, adapter_dtype, p):
    check(dtype, adapter_dtype, p)


def _right(change):
    def right(self, name):
        return change(self.lora_A[name], self.lora_E[name])

    return right


MISTAKES = {
    "no E": _right(lambda A, E: A + 0 * E),
    "E twice": _right(lambda A, E: E * E * A),
    "E of another triplet": _right(lambda A, E: E.roll(1, 0) * A),
    "E without its sign": _right(lambda A, E: E.abs() * A),
    "E held constant": _right(lambda A, E: E.detach() * A + 0 * E),
    "A's gradient without E": _right(lambda A, E: A + (E * A - A).detach() + 0 * E),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_equation_break_the_rule(name, monkeypatch):
    monkeypatch.setattr(LoRALinear, "right", MISTAKES[name])
    with pytest.raises(AssertionError):
        check(torch.float32, torch.float32, 0.0)


@pytest.mark.parametrize("wrong", [7 / 5, 7 / 5**0.5, 7 / (5 + 1e-4)])
def test_mistakes_in_the_scaling_break_the_rule(wrong, monkeypatch):
    monkeypatch.setattr(adapters, "scaling", lambda *args: wrong)
    with pytest.raises(AssertionError):
        check(torch.float64, torch.float64, 0.0)


def test_gradcheck():
    made, x = layer(torch.float64, K=6, N=5, r=3), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def call(x, A, B, E):
        parameters = {"lora_A.default": A, "lora_B.default": B, "lora_E.default": E}
        return torch.func.functional_call(made, parameters, (x,))

    inputs = [t.detach().requires_grad_() for t in tensors(made)]
    assert torch.autograd.gradcheck(call, (x, *inputs))


def saved_bytes(made, x):
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = made(x)
    del y
    return sum(found.values())


def test_it_saves_one_tensor_of_a_s_size_more_than_lora():
    x = torch.randn(64, 24, requires_grad=True)
    assert saved_bytes(layer(), x) - saved_bytes(layer(use_adalora=False), x) <= 4 * (5 * 24 + 5)


def test_it_begins_as_peft_s():
    torch.manual_seed(0)
    made = LoRALinear(200, 100, r=50, use_adalora=True)
    A, B, E = tensors(made)
    assert E.shape == (50, 1)
    assert not E.any()
    for matrix in (A, B):
        assert abs(matrix.std().item() - 0.02) < 1e-3
    x = torch.randn(3, 200)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    made(x).sum().backward()
    assert E.grad.any()
    assert not A.grad.any()
    with torch.no_grad():
        E.fill_(1.0)
    made.reset_lora_parameters("default")
    assert not E.any()
    assert repr(made).count("AdaLoRA r=50, lora_alpha=8") == 1
    assert sorted(made.state_dict()) == ["bias", "lora_A.default", "lora_B.default", "lora_E.default", "weight"]
    with torch.device("meta"):
        later = LoRALinear(20, 10, r=4, use_adalora=True)
    later = later.to_empty(device="cpu")
    later.reset_parameters()
    assert torch.equal(later(x[:, :20]), nn.functional.linear(x[:, :20], later.weight, later.bias))


def conv1d():
    made = Conv1D(32, 64)
    nn.init.normal_(made.weight, std=0.1)
    return made


BASES = {
    "dense": (lambda: nn.Linear(64, 32), {}),
    "conv1d": (conv1d, {}),
    "nf4": (lambda: nn.Linear(64, 32), {"quantize": "nf4"}),
}


@pytest.mark.parametrize("base", BASES)
def test_merging_and_back_over_every_base(base):
    make, options = BASES[base]
    made, x = layer(base=make(), **options).eval(), torch.randn(5, 64)
    before, y = made.weight.clone(), made(x)
    A, B, E = tensors(made)
    W = made.matrix if base != "nf4" else made.matrix.dequantize()
    torch.testing.assert_close(y, equation(x, W, made.bias, A, B, E, nn.Identity()), rtol=1e-4, atol=1e-4)
    error = made.merge()
    if base != "nf4":
        torch.testing.assert_close(made(x), y, rtol=1e-4, atol=1e-4)
    else:
        assert 0 < error < 0.15
    made.unmerge()
    assert torch.equal(made.weight, before)
    assert torch.equal(made(x), y)
    plain = made.to_linear()
    assert plain.weight.shape == make().weight.shape


def test_adapters_of_different_kinds_lie_side_by_side():
    made, x = layer(), torch.randn(4, 24)
    made.add_adapter("lora", 3, 6, init_lora_weights=False, lora_bias=True)
    made.add_adapter("other", 2, 6, init_lora_weights=False, use_adalora=True)
    first, frozen = made(x), {name for name, p in made.named_parameters() if not p.requires_grad}
    assert frozen == {
        "weight",
        "bias",
        "lora_A.lora",
        "lora_B.lora",
        "lora_bias.lora",
        "lora_A.other",
        "lora_B.other",
        "lora_E.other",
    }
    made.set_adapter("lora")
    assert not made.lora_E["default"].requires_grad
    expected = x.double() @ dense(made, "lora").T + (made.bias + 2 * made.lora_bias["lora"]).double()
    torch.testing.assert_close(made(x).double(), expected, rtol=1e-5, atol=1e-5)
    made.set_adapter("other")
    assert made.lora_E["other"].requires_grad
    twin = copy.deepcopy(made)
    assert torch.equal(twin(x), made(x))
    made.set_adapter("default")
    assert torch.equal(made(x), first)
    made.delete_adapter("default")
    assert sorted(made.lora_E) == ["other"]
    assert made.active_adapter is None
    assert len(made.adapter_parameters()) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_rslora": True}, "use_rslora: got True, expected False for AdaLoRA"),
        ({"lora_bias": True}, "lora_bias: got True, expected False for AdaLoRA"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights: got 'gaussian', expected True or False for AdaLoRA"),
        ({"r": 0}, "r: got 0"),
    ],
)
def test_options_that_it_lacks(options, words):
    made = layer()
    with pytest.raises(ValueError, match=words):
        made.add_adapter("new", **{"r": 2, "lora_alpha": 2, "use_adalora": True, **options})
    assert list(made.adapters) == ["default"]


# ---- a whole model ----


def test_a_model_with_both_kinds():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16)).eval(), torch.randn(4, 64)
    base = model(x)
    add_lora(model, AdaLoRAConfig(init_r=4, target_modules=["0", "2"], init_lora_weights=False), quantize="nf4")
    add_lora(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=False), "lora")
    keys = lora_state_dict(model)
    assert {key for key in keys if "lora_E" in key} == {"0.lora_E.default", "2.lora_E.default"}
    set_adapter(model, None)
    quantized = model(x)
    assert 0 < (quantized - base).norm() / base.norm() < 0.3
    set_adapter(model, "default")
    y = model(x)
    codes = model[0].weight.clone()
    merge_lora(model)
    unmerge_lora(model)
    assert torch.equal(model[0].weight, codes)
    assert torch.equal(model(x), y)
    assert not torch.equal(y, quantized)
