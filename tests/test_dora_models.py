"""DoRA in whole models: fused blocks, 4 bits, several adapters, learning rates, offloading, one graph, what is refused."""

import copy

import pytest
import torch
from blocks_case import CASES, FUSED, SameMasks, check_same, results
from dora_case import dense, layer
from torch import nn

from lora_kernels import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRALinear,
    add_lora,
    add_weighted_adapter,
    delete_adapter,
    fuse_blocks,
    lora_parameters,
    lora_plus_param_groups,
    merge_lora,
    remove_lora,
    set_adapter,
    unfuse_blocks,
    unmerge_lora,
)

X = torch.randn(9, 64, generator=torch.Generator().manual_seed(5))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16))


def adapted(base=None, adapter_name="default", **options):
    """With magnitudes that are not n, as after training."""
    base, quantize = plain() if base is None else base, options.pop("quantize", None)
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False, "use_dora": True, **options}
    add_lora(base, LoRAConfig(**options), adapter_name, quantize=quantize)
    away_from_n(base, adapter_name)
    return base


@torch.no_grad()
def away_from_n(model, adapter_name="default"):
    torch.manual_seed(3)
    for module in model.modules():
        if isinstance(module, LoRALinear) and adapter_name in module.lora_magnitude:
            module.lora_magnitude[adapter_name].mul_(torch.rand(module.out_features) + 0.5)


# ---- fused blocks ----


@pytest.mark.parametrize(
    ("name", "groups", "skipped"),
    [
        ("llama", 4, "DoRA"),  # q, k and v; gate and up, as the MLP cannot be one
        ("gpt2", 0, "DoRA"),
        ("bert", 2, "two modules"),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_groups_are_fused_and_mlps_compute_as_before(name, groups, skipped, p, monkeypatch):
    case = CASES[name]
    model, batch = case.model(use_dora=True, lora_dropout=p), case.batch()
    away_from_n(model)
    if p:
        SameMasks(model, monkeypatch)
    expected = results(model, batch)
    assert sum("lora_magnitude" in key for key in expected) == sum(isinstance(m, LoRALinear) for m in model.modules())
    report = fuse_blocks(model)
    assert (len(report.groups), report.mlps) == (groups, [])
    assert any(skipped in reason for reason in report.skipped.values())
    check_same(results(model, batch), expected)
    assert report.calls() == {FUSED: groups}
    model.eval()
    fused = model(**batch)[0]
    unfuse_blocks(model)
    torch.testing.assert_close(fused, model(**batch)[0], rtol=1e-9, atol=1e-9)


def test_a_group_of_dora_lora_and_plain_members():
    model, batch = CASES["llama"].model(use_dora=True, target_modules=["q_proj"]), CASES["llama"].batch()
    add_lora(model, LoRAConfig(target_modules=["k_proj"], init_lora_weights=False), "lora")
    for block in model.model.layers:
        block.self_attn.k_proj.set_adapter("lora")
    away_from_n(model)
    expected = results(model, batch)
    report = fuse_blocks(model)
    check_same(results(model, batch), expected)
    assert report.calls() == {FUSED: 2}
    assert report.groups[0].endswith("{q_proj,k_proj,v_proj}")


@pytest.mark.parametrize("training", [True, False])
def test_an_mlp_that_was_fused_falls_back_while_dora_is_active(training):
    case = CASES["llama"]
    model, batch = case.model(), case.batch()
    report = fuse_blocks(model)
    add_lora(model, LoRAConfig(target_modules=["down_proj"], init_lora_weights=False, use_dora=True), "dora")
    away_from_n(model, "dora")
    set_adapter(model, "dora")
    model.train(training)
    y = results(model, batch)
    assert report.calls() == {FUSED: 0, "DoRA": 2, "no adapted member": 6}  # q, k and v have none
    unfuse_blocks(model)
    check_same(y, results(model, batch))


# ---- models ----


def test_over_4_bits_beside_a_plain_adapter_merged_and_back():
    model = adapted(quantize="nf4").eval()
    set_adapter(model, None)
    quantized = model(X)
    set_adapter(model, "default")
    y, codes = model(X), model[0].weight.clone()
    adapted(model, "lora", use_dora=False, r=2)
    set_adapter(model, "lora")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "magnitude" in name)
    lora = model(X)
    merge_lora(model)
    unmerge_lora(model)
    assert torch.equal(model(X), lora)
    set_adapter(model, "default")
    errors = merge_lora(model)
    assert 0 < max(errors.values()) < 0.2
    assert (model(X) - y).norm() < (quantized - y).norm() / 2
    unmerge_lora(model)
    assert torch.equal(model[0].weight, codes)
    assert torch.equal(model(X), y)
    delete_adapter(model, "default")
    assert not [name for name, _ in model.named_parameters() if "magnitude" in name]


def test_the_plain_model_has_the_merged_weights_or_its_own():
    model, weight = adapted().eval(), plain()[0].weight
    y = model(X)
    expected = dense(model[0])
    kept = copy.deepcopy(model)
    remove_lora(kept)
    assert torch.equal(kept[0].weight, weight)
    merge_lora(model)
    remove_lora(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)


def test_magnitudes_are_trained_at_a_s_rate():
    model = adapted()
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[1] for p in lora_parameters(model)} == {"lora_A", "lora_B", "lora_magnitude"}
    rates = {names[id(p)]: group["lr"] for group in lora_plus_param_groups(model, 1e-3, 8.0) for p in group["params"]}
    assert rates == {name: 8e-3 if "lora_B" in name else 1e-3 for name in rates}
    assert len(rates) == 6
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.01)
    before, losses = {name: p.clone() for name, p in model.named_parameters()}, []
    for _ in range(5):
        loss = (model(X) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(rates)


def test_what_is_refused_changes_nothing():
    with pytest.raises(ValueError, match="lora_bias: got True, expected False for DoRA"):
        LoRAConfig(use_dora=True, lora_bias=True)
    with pytest.raises(ValueError, match="use_dora: got True, expected False for AdaLoRA: it has no magnitude"):
        AdaLoRAConfig(use_dora=True)
    with pytest.raises(TypeError, match="use_dora: got 1, expected True or False"):
        LoRAConfig(use_dora=1)
    model = adapted(adapted(), "lora", use_dora=False)
    with pytest.raises(ValueError, match=r"adapters: 'default' is a DoRA adapter.*save_merged"):
        add_weighted_adapter(model, ["lora", "default"], [0.5, 0.5], "mix", "cat")
    assert list(model[0].adapters) == ["default", "lora"]
    add_weighted_adapter(model, ["lora"], [0.5], "mix")
    assert "mix" not in model[0].lora_magnitude


def test_over_a_weight_that_accelerate_offloads():
    accelerate = pytest.importorskip("accelerate")
    base = plain()
    expected = adapted(copy.deepcopy(base))
    accelerate.cpu_offload(base, execution_device="cpu")
    model = adapted(base)
    assert model[0].weight.is_meta
    for own, kept in zip(lora_parameters(model), lora_parameters(expected), strict=True):
        own.data.copy_(kept.data)
    torch.testing.assert_close(model(X), expected(X))
    model[0].reset_lora_parameters("default")
    n = model[0]._norm(model[0].lora_A["default"], model[0].lora_B["default"], model[0].adapters["default"].scaling)
    assert torch.equal(model[0].lora_magnitude["default"], n)
    y = model.eval()(X)
    merge_lora(model)
    torch.testing.assert_close(model(X), y, rtol=1e-4, atol=1e-5)
    unmerge_lora(model)
    assert torch.equal(model(X), y)


def test_one_graph():
    made, x = layer(), torch.randn(4, 24)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    expected = made(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in made.adapter_parameters()]
    made.zero_grad()
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close([p.grad for p in made.adapter_parameters()], grads)
