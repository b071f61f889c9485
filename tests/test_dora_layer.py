"""LoRALinear with DoRA: the equation in float64 and PEFT's layer, the start, merging, several adapters, values that hurt."""

import copy
import random

import pytest
import torch
from accuracy import violations
from dora_case import BASES, KINDS, dense, equation, layer, tensors
from peft_case import Layer
from torch import nn
from variant_case import check_equation, results

from lora_kernels import LoRALinear, dora_norm

DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


def check(dtype, adapter_dtype, p):
    """Assert the one rule for a layer in training, PyTorch's own operations in float64 being the truth."""
    made = layer(dtype, adapter_dtype, lora_dropout=p)
    check_equation(made, tensors(made), "ABm", lambda x, W, c, A, B, m, drop: equation(x, W, c, A, B, m, 7 / 5, drop), p)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_the_equation_under_the_rule(dtype, adapter_dtype, p):
    check(dtype, adapter_dtype, p)


_weights = LoRALinear._weights
MISTAKES = {
    "no magnitude": lambda w: w._replace(magnitude=dora_norm(*w[:3], w.scaling) + 0 * w.magnitude),
    "another row's": lambda w: w._replace(magnitude=w.magnitude.roll(1, 0)),
    "m constant": lambda w: w._replace(magnitude=w.magnitude.detach() + 0 * w.magnitude),
    "the bias in it": lambda w: w._replace(bias=w.magnitude / dora_norm(*w[:3], w.scaling) * w.bias),
    "m over W's norm": lambda w: w._replace(magnitude=w.magnitude * dora_norm(*w[:3], w.scaling) / w.weight.norm(dim=1)),
    "m times n": lambda w: w._replace(magnitude=w.magnitude * dora_norm(*w[:3], w.scaling)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_the_layer_break_the_rule(name, monkeypatch):
    monkeypatch.setattr(LoRALinear, "_weights", lambda self, adapter: MISTAKES[name](_weights(self, adapter)))
    with pytest.raises(AssertionError):
        check(torch.float32, torch.float32, 0.0)


# ---- PEFT's layer ----


def random_layer(seed):
    """Any options that PEFT's DoRA has without dropout."""
    pick = random.Random(seed)
    options = {"use_dora": True, "r": pick.choice((1, 3, 8, 27)), "lora_alpha": pick.choice((1, 6, 20.5))}
    options["use_rslora"] = pick.random() < 0.5
    dtype = pick.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    return Layer(
        shape=pick.choice(((1,), (17,), (2, 3, 7))),
        dtype=dtype,
        bias=pick.random() < 0.7,
        conv1d=pick.random() < 0.3,
        autocast_adapter_dtype=dtype != torch.bfloat16,
        options=tuple(options.items()),
    )


def as_ours(theirs, trained=True):
    """PEFT's layer as a LoRALinear over the same weight, with the same adapter."""
    theirs, name = theirs.base_model.model[0], "default"
    A, B = theirs.lora_A[name].weight, theirs.lora_B[name].weight
    made = LoRALinear.from_linear(copy.deepcopy(theirs.base_layer), r=len(A), use_dora=True, dtype=A.dtype)
    made.adapters[name].scaling = theirs.scaling[name]
    with torch.no_grad():
        for own, tensor in zip(tensors(made), (A, B, theirs.lora_magnitude_vector[name].weight), strict=True):
            own.copy_(tensor)
    return made


@pytest.mark.parametrize("seed", range(24))
def test_peft_s_results_and_gradients_without_dropout(seed):
    torch.manual_seed(seed)
    case = random_layer(seed)
    theirs = case.build().train()
    made = as_ours(theirs).train()
    n = dora_norm(made.matrix, *tensors(made)[:2], made.adapters["default"].scaling)
    own = theirs.base_model.model[0].lora_magnitude_vector["default"].weight
    coarse = torch.finfo(case.dtype).eps  # PEFT's first norm over 16 bits is rounded to them, also for float32 adapters
    torch.testing.assert_close(n.to(own.dtype), own, rtol=2 * coarse, atol=0)
    with torch.no_grad():  # as training would
        factor = torch.rand(case.N) + 0.5
        own.mul_(factor)
        made.lora_magnitude["default"].copy_(own)
    x, dy = torch.randn(*case.shape, case.K).to(case.dtype), torch.randn(*case.shape, case.N).to(case.dtype)
    found = results("ABm", made, x.requires_grad_(), tensors(made), dy)
    runs = [case.run(theirs, x, dy), case.run(copy.deepcopy(theirs).double(), x.double(), dy.double())]
    expected, exact = (dict(zip(found, run.values(), strict=True)) for run in runs)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in expected.items()}
    assert not (broken := violations(found, expected, exact, case.dtype)), f"{case}: {broken}"


@pytest.mark.parametrize("base", BASES)
def test_merging_and_back_over_every_base(base):
    make, options = BASES[base]
    made, x = layer(base=make(), **options).eval(), torch.randn(5, 64)
    before, y, wanted = made.weight.clone(), made(x), dense(made)
    torch.testing.assert_close(y.double(), x.double() @ wanted.T + made.bias, rtol=1e-4, atol=1e-4)
    error, bias = made.merge(), made.bias
    if base == "nf4":
        new = made.matrix.dequantize(torch.float32).double()
        assert error == pytest.approx(((new - wanted).norm() / wanted.norm()).item(), rel=1e-3)
        assert 0 < error < 0.15
    else:
        torch.testing.assert_close(made.matrix.double(), wanted, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(made(x), y, rtol=1e-4, atol=1e-4)
    assert made.bias is bias
    made.unmerge()
    assert torch.equal(made.weight, before)
    assert torch.equal(made(x), y)
    assert made.to_linear().weight.shape == make().weight.shape


def test_merging_is_rounded_once_and_peft_s():
    case = Layer(dtype=torch.bfloat16, options=(("use_dora", True),))
    theirs = case.build()
    with torch.no_grad():
        theirs.base_model.model[0].lora_magnitude_vector["default"].weight.mul_(1.3)
    made = as_ours(theirs)
    expected = dense(made).to(torch.bfloat16)
    made.merge()
    assert torch.equal(made.weight, expected)
    theirs.merge_adapter()
    torch.testing.assert_close(theirs.base_model.model[0].base_layer.weight, made.weight, rtol=2**-7, atol=0)


# ---- the start ----


STARTS = [(base, init) for base in BASES for init in (True, False, "gaussian", "orthogonal")]
STARTS += [(base, init) for base in ("dense", "conv1d") for init in ("pissa", "pissa_niter_4", "olora")]  # they rewrite W


@pytest.mark.parametrize(("base", "init"), STARTS)
def test_the_function_is_what_it_is_without_a_magnitude(base, init):
    make, options = BASES[base]
    linear, x = make(), torch.randn(5, 64)
    original = linear(x)
    made = layer(base=linear, trained=False, r=4, init_lora_weights=init, **options)
    A, B, m = tensors(made)
    assert torch.equal(m, dora_norm(made.matrix, A, B, made.adapters["default"].scaling).to(A.dtype))
    y = made(x)
    total = made.plus(A, B, made.adapters["default"].scaling)
    torch.testing.assert_close(y, x @ total.T + made.bias, rtol=1e-4, atol=1e-5)
    if init is not False and base != "nf4":
        torch.testing.assert_close(y, original, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        m.mul_(2)
    made.reset_lora_parameters("default")
    assert torch.equal(m, dora_norm(made.matrix, A, B, made.adapters["default"].scaling).to(A.dtype))


def test_from_the_meta_device_and_states_of_the_base():
    with torch.device("meta"):
        made = LoRALinear(20, 10, r=4, use_dora=True)
    assert made.lora_magnitude["default"].is_meta
    made = made.to_empty(device="cpu")
    made.load_state_dict(nn.Linear(20, 10).state_dict(), strict=False)
    made.reset_lora_parameters("default")
    m, x = made.lora_magnitude["default"], torch.randn(3, 20)
    torch.testing.assert_close(m, made.weight.norm(dim=1))
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias))
    before = m.clone()
    made.load_state_dict({"weight": 3 * made.weight, "bias": made.bias}, strict=False)
    assert torch.equal(m, before), "it is the adapter's, not the base's"
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight / 3, made.bias))
    made.reset_parameters()
    torch.testing.assert_close(m, made.weight.norm(dim=1))
    assert sorted(made.state_dict()) == ["bias", "lora_A.default", "lora_B.default", "lora_magnitude.default", "weight"]
    assert "adapters={default: DoRA r=4, lora_alpha=8}" in repr(made)


# ---- several adapters, options, values that hurt ----


def test_adapters_of_different_kinds_lie_side_by_side():
    made, x = layer(), torch.randn(4, 24)
    made.add_adapter("lora", 3, 6, init_lora_weights=False)
    made.add_adapter("other", 2, 6, init_lora_weights=False, use_dora=True)
    first = made(x)
    own = {f"{kind}.default" for kind in KINDS}
    assert {name for name, p in made.named_parameters() if p.requires_grad} == own
    made.set_adapter("lora")
    expected = x @ (made.weight + 2 * made.lora_B["lora"] @ made.lora_A["lora"]).T + made.bias
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == {"lora_A.lora", "lora_B.lora"}
    made.set_adapter("other")
    assert made.lora_magnitude["other"].requires_grad
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    made.set_adapter("default")
    assert torch.equal(made(x), first)
    made.set_adapter(None)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    made.delete_adapter("default")
    assert sorted(made.lora_magnitude) == ["other"]


@pytest.mark.parametrize("option", ["lora_bias", "use_adalora"])
def test_options_that_exclude_each_other(option):
    words = {"lora_bias": "lora_bias: got True, expected False for DoRA", "use_adalora": "use_dora: got True.* for AdaLoRA"}
    made = layer()
    with pytest.raises(ValueError, match=words[option]):
        made.add_adapter("new", 2, 2, use_dora=True, **{option: True})
    assert list(made.adapters) == ["default"]


def test_values_that_hurt():
    """Rows of W that are zero, which are NaN in PEFT; m = 0; a rank above the number of rows."""
    case = Layer(options=(("use_dora", True), ("r", 40)))
    theirs = case.build()
    with torch.no_grad():
        theirs.base_model.model[0].base_layer.weight[3] = 0
        theirs.base_model.model[0].lora_B["default"].weight[3] = 0
        theirs.base_model.model[0].lora_magnitude_vector["default"].weight[5] = 0
    made, x, dy = as_ours(theirs), torch.randn(7, 24).requires_grad_(), torch.randn(7, 33)
    assert theirs.base_model.model[0](x)[:, 3].isnan().all()
    found = results("ABm", made, x, tensors(made), dy)
    assert all(t.isfinite().all() for t in found.values())
    assert torch.equal(found["y"][:, [3, 5]], made.bias[[3, 5]].expand(7, 2))
    assert found["dm"][3] == 0
    A, B, _ = tensors(made)
    v = x @ (made.weight + made.adapters["default"].scaling * B @ A)[5]
    n = dora_norm(made.matrix, A, B, made.adapters["default"].scaling)
    torch.testing.assert_close(found["dm"][5], (dy[:, 5] * v).sum() / n[5], msg="a magnitude of zero goes on learning")
    made.merge()
    assert torch.equal(made.weight[[3, 5]], torch.zeros(2, 24))
    made.unmerge()
    made.reset_lora_parameters("default")
    assert made.lora_magnitude["default"][3] == 0


def test_what_is_saved_beyond_lora_is_one_result_and_n():
    def saved_bytes(made):
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            made(x)
        return sum(found.values())

    x = torch.randn(64, 24, requires_grad=True)
    more = saved_bytes(layer()) - saved_bytes(layer(use_dora=False, trained=False))
    assert 4 * 64 * 33 < more <= 4 * (64 * 33 + 2 * 33)
