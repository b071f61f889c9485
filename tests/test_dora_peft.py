"""PEFT's DoRA layers accelerated: PEFT's numbers without dropout, lora_linear's equation or PEFT's own forward with it."""

import copy
import pickle
import random
from dataclasses import dataclass

import pytest
import torch
from blocks_case import ALL, CASES, FUSED, check_same, results
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_case import FAST, Layer
from peft_model import IDS, Model, adapted, close, layer
from torch import nn
from torch.nn import functional

from lora_kernels import accelerate, accelerated, restore
from lora_kernels.integrations.peft import linear
from lora_kernels.integrations.peft.parts import DROPS_TWICE
from lora_kernels.reference.magnitude import norm

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Equation(lora.Linear):
    """y = (m / n) ⊙ (x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + c by PyTorch's operations."""

    def forward(self, x):
        base, A, B = self.base_layer, self.lora_A["default"].weight, self.lora_B["default"].weight
        W = base.weight.T if self.fan_in_fan_out else base.weight
        m, s = self.lora_magnitude_vector["default"].weight, self.scaling["default"]
        low_rank = functional.linear(functional.linear(self.lora_dropout["default"](x).to(A.dtype), A), B) * s
        y = (m / norm(W, A, B, s)) * (functional.linear(x, W) + low_rank)
        return (y if base.bias is None else y + base.bias).to(x.dtype)


@dataclass
class DoraLayer(Layer):
    """With a magnitude that is not the norm."""

    def build(self):
        self.options = (*self.options, ("use_dora", True))
        model = super().build()
        with torch.no_grad():
            magnitude = model.base_model.model[0].lora_magnitude_vector["default"].weight
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
        return model

    def accelerate(self, model):
        return accelerate(model, dora_dropout="low_rank")

    def fix_mask(self, layer, seed):
        super().fix_mask(layer, seed)
        layer.__class__ = Equation


def random_layer(seed):
    choose = random.Random(seed).choice
    dtype = choose([BF16, FP16, FP32, FP32, FP64])
    options = [{"use_rslora": True}, {"r": 1}, {"r": 9}, {"r": 8, "rank_pattern": {"0": 3}, "alpha_pattern": {"0": 5}}, {}]
    return DoraLayer(
        shape=choose([(1,), (3, 7), (64,), (2, 1, 5)]),
        K=choose([24, 40, 65]),
        N=choose([33, 64, 8]),
        dtype=dtype,
        bias=choose([True, False]),
        conv1d=choose([True, False, False]),
        autocast=None if dtype == FP64 else choose([None, None, BF16]),
        autocast_adapter_dtype=choose([True, True, False]),
        options=tuple(choose(options).items()),
    )


@pytest.mark.parametrize("seed", range(40))
def test_peft_s_numbers_without_dropout(seed):
    random_layer(seed).check()


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("options", [{}, {"conv1d": True}, {"bias": False, "shape": (1,)}], ids=str)
def test_low_rank_dropout_is_the_equation(dtype, options):
    DoraLayer(dtype=dtype, lora_dropout=0.4, **options).check()


@pytest.mark.parametrize("mistake", ["no magnitude", "a magnitude without gradient", "PEFT's dropout"])
def test_mistakes_break_the_rule(mistake, monkeypatch):
    made, right = DoraLayer(dtype=FP64, lora_dropout=0.4), linear.weights_of
    if mistake == "PEFT's dropout":
        monkeypatch.setattr(DoraLayer, "fix_mask", Layer.fix_mask)
    else:
        wrong = (lambda m: None) if mistake == "no magnitude" else (lambda m: m.detach() + 0 * m)
        monkeypatch.setattr(linear, "is_plain", lambda *_: False)
        monkeypatch.setattr(linear, "weights_of", lambda *a: right(*a)._replace(magnitude=wrong(right(*a).magnitude)))
    with pytest.raises((AssertionError, RuntimeError)):
        made.check()


def dora(dora_dropout="peft", **options):
    """(PEFT's model, its accelerated copy, the report), in evaluation."""
    plain = adapted(use_dora=True, **options)
    for name in ("up", "down"):
        layer(plain, name).lora_magnitude_vector["default"].weight.data.mul_(torch.rand(()) + 0.5)
    ours = copy.deepcopy(plain)
    return plain, ours, accelerate(ours, dora_dropout=dora_dropout)


def gradients(model):
    model(IDS).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_peft_s_dropout_is_peft_s_own_forward_and_counted():
    plain, ours, report = dora(lora_dropout=0.3)
    close(ours(IDS), plain(IDS))
    assert report.calls() == {FAST: 2}, "in evaluation"
    found = []
    for model in (plain, ours):
        model.train()
        torch.manual_seed(4)
        found.append(gradients(model))
    assert all(torch.equal(grad, found[0][name]) for name, grad in found[1].items())
    assert report.calls() == {FAST: 2, DROPS_TWICE: 2}
    again = accelerate(ours)
    assert again.falling_back == dict.fromkeys(again.accelerated, DROPS_TWICE)
    assert str(again).startswith(f"0 of 2 LoRA layers fast now: 2 × {DROPS_TWICE}\n")
    for model in (plain, ours):
        for name in ("up", "down"):
            layer(model, name).lora_dropout["default"].p = 0.0
    close(ours(IDS), plain(IDS))
    assert report.calls() == {FAST: 4, DROPS_TWICE: 2}


def test_low_rank_dropout_holds_for_copies_until_another_call_or_restore():
    _, model, report = dora("low_rank", lora_dropout=0.3)
    before = [sorted(vars(m)) for m in dora(lora_dropout=0.3)[0].modules()]
    assert not report.falling_back
    for twin in (model.train(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(4)
        y = twin(IDS)
        torch.manual_seed(4)
        assert torch.equal(twin(IDS), y)
        assert not torch.equal(twin(IDS), y)
    assert report.calls() == {FAST: 6}
    model(IDS)
    assert accelerate(model).calls() == {FAST: 8}, "the counters stay"
    model(IDS)
    assert report.calls() == {FAST: 8, DROPS_TWICE: 2}
    accelerate(model, dora_dropout="low_rank")
    restore(model)
    assert [sorted(vars(m)) for m in model.modules()] == before


def test_a_config_with_low_rank_dropout(tmp_path):
    config = LoraConfig(target_modules=["up", "down"], use_dora=True, lora_dropout=0.3)
    model = get_peft_model(Model(), copy.deepcopy(accelerated(config, dora_dropout="low_rank"))).train()
    model(IDS)
    assert layer(model).__dict__[linear.CALLS] == {FAST: 1}
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("call", [lambda **o: accelerate(Model(), **o), lambda **o: accelerated(LoraConfig(), **o)])
def test_another_dropout_is_an_error(call):
    with pytest.raises(ValueError, match=r"dora_dropout: got 'lora', expected 'peft' or 'low_rank'"):
        call(dora_dropout="lora")


def test_switching_scaling_merging_and_disabling(tmp_path):
    plain, ours, report = dora()

    def same(reason=FAST, count=2):
        before = report.calls().get(reason, 0)
        close(ours(IDS), plain(IDS))
        assert report.calls()[reason] == before + count

    same()
    for model in (plain, ours):
        torch.manual_seed(3)
        model.add_adapter("lora", LoraConfig(target_modules=["up"], r=2, init_lora_weights=False))
        model.set_adapter("lora")
    same(count=1)
    for model in (plain, ours):
        model.base_model.set_adapter(["default", "lora"])
    same("several active adapters", 1)
    for model in (plain, ours):
        model.set_adapter("default")
        layer(model).set_scale("default", 3.0)
    same()
    for model in (plain, ours):
        model.merge_adapter()
    same("adapters are merged")
    for model in (plain, ours):
        model.unmerge_adapter()
    same()
    with plain.disable_adapter(), ours.disable_adapter():
        same("adapters are disabled")
    ours.save_pretrained(tmp_path)
    loaded = copy.deepcopy(plain)
    loaded.load_adapter(tmp_path, "again")
    accelerate(loaded)
    loaded.set_adapter("again")
    layer(loaded).set_scale("again", 3.0)
    close(loaded(IDS), ours(IDS))
    close(ours.merge_and_unload()(IDS), plain.merge_and_unload()(IDS))


# ---- what falls back ----


class Wrapped(nn.Parameter):
    pass


CHANGES = {
    "magnitude has hooks": lambda m, _: m.register_forward_hook(lambda module, args, y: 2 * y),
    "magnitude's forward was replaced on the instance": lambda m, _: setattr(
        m, "forward", lambda x, **k: torch.ones_like(x[..., :1])
    ),
    "lora_magnitude_vector is a Subclass": lambda m, _: setattr(m, "__class__", type("Subclass", (type(m),), {})),
    "a Wrapped among the tensors": lambda m, _: setattr(m.weight, "__class__", Wrapped),
    "parameters are sharded, or have other shapes than the layer's": lambda m, _: setattr(
        m, "weight", nn.Parameter(m.weight[:1])
    ),
    "DoRA with a bias of lora_B, which PEFT's norm takes for a part of the weight": lambda _, B: setattr(
        B, "bias", nn.Parameter(torch.ones(B.out_features))
    ),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_falls_back_gives_peft_s_own_result_and_says_why(reason):
    plain, ours, _ = dora()
    for model in (plain, ours):
        for name in ("up", "down"):
            CHANGES[reason](layer(model, name).lora_magnitude_vector["default"], layer(model, name).lora_B["default"])
    report = accelerate(ours)
    assert report.falling_back == dict.fromkeys(report.accelerated, reason)
    assert torch.equal(ours(IDS), plain(IDS))
    assert report.calls() == {FAST: 0, reason: 2}


def test_a_vector_is_peft_s_and_a_row_of_zeros_is_defined():
    plain, ours, report = dora()
    assert torch.equal(layer(ours)(torch.ones(24)), layer(plain)(torch.ones(24)))
    assert report.calls() == {FAST: 0, "DoRA of a vector, which PEFT returns as a row": 1}
    up = layer(ours)
    up.base_layer.weight.data[3] = up.lora_B["default"].weight.data[3] = 0
    assert torch.equal(up(torch.ones(2, 24))[:, 3], up.base_layer.bias[3].expand(2))


# ---- blocks and tools ----


def llama(**options):
    torch.manual_seed(0)
    options = {"target_modules": ALL, "r": 4, "init_lora_weights": False, "use_dora": True, **options}
    return get_peft_model(CASES["llama"].make().double(), LoraConfig(**options), autocast_adapter_dtype=False).train()


def test_q_k_v_and_gate_up_are_groups_and_mlps_are_not():
    model, batch = llama(), CASES["llama"].batch()
    expected = results(model, batch)
    report = accelerate(model)
    check_same(results(model, batch), expected)
    assert report.calls() == {FAST: 14}
    assert set(report.blocks.skipped.values()) == {"DoRA"}
    assert not report.blocks.mlps
    assert report.blocks.calls() == {FUSED: 4}


def test_checkpoints_compute_the_same_dropout_again():
    model, batch = llama(lora_dropout=0.2), CASES["llama"].batch()
    report = accelerate(model, dora_dropout="low_rank")
    results(model, batch)  # the groups have learned who shares x
    torch.manual_seed(6)
    expected = results(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(6)
    check_same(results(model, batch), expected)
    assert report.calls().keys() == {FAST}


@pytest.mark.parametrize(("dora_dropout", "lora_dropout"), [("peft", 0.0), ("low_rank", 0.2)])
def test_torch_compile_in_one_graph(dora_dropout, lora_dropout):
    torch._dynamo.reset()
    _, model, _ = dora(dora_dropout, lora_dropout=lora_dropout)
    expected, found = model(IDS), []

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    close(torch.compile(model, fullgraph=True, backend=backend)(IDS), expected)
    assert sum("lora_kernels.linear" in target for target in found) == 2
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    compiled(IDS).sum().backward()
    assert layer(model).lora_magnitude_vector["default"].weight.grad.abs().sum() > 0
