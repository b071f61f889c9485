"""Stacks of experts that bitsandbytes has put into 4 bits (replace_parameter_4bit): its codes are read, and not dequantised."""

import copy
import warnings

import pytest
import torch
from experts_case import IDS, MODELS, Largest, in_double, moe, run, with_peft
from nf4_bitsandbytes import same_state
from peft import PeftModel
from peft_model import FAST
from safetensors.torch import load_file
from torch import nn

from lora_kernels import (
    LoRAConfig,
    accelerate,
    add_lora,
    load_adapter,
    register_experts,
    remove_lora,
    save_adapter,
    save_merged,
)
from lora_kernels.layers.experts import is_experts, weight_names
from lora_kernels.layers.experts_4bit import quantized_stack
from lora_kernels.layers.lora_experts import LoRAStack

parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
FORMS = [{}, {"compress_statistics": True}, {"quant_type": "fp4", "blocksize": 32}]


def experts_of(model):
    return {path: module for path, module in model.named_modules() if is_experts(module)}


def moe4(name, **options):
    """The model with stacks that bitsandbytes has quantised, and the one with what they stand for."""
    model, dense = moe(name), moe(name)
    for experts, plain in zip(experts_of(model).values(), experts_of(dense).values(), strict=True):
        for stack in weight_names(experts):
            parametrize.replace_parameter_4bit(experts, stack, **options)
            own = experts.parametrizations[stack]
            w = quantized_stack(experts, stack)
            if not experts.is_transposed:
                same_state(w, own.original, own[0].quant_state)
            getattr(plain, stack).data = w.dequantize()
    return model, dense


def names_of(model):
    """PEFT matches whole names of parameters that are parametrised."""
    return [f"{path}.{name}" for path, experts in experts_of(model).items() for name in weight_names(experts)]


def drawn_adapters(model):
    """The values of B and A by what they belong to, the same in every order of PEFT's wrappers."""
    for path, p in sorted(model.named_parameters(), key=lambda named: (tuple(named[1].shape), named[0].count("layers.1"))):
        if ".lora_" in path:
            generator = torch.Generator().manual_seed(p.numel() * 7 + path.count("layers.1"))
            p.data = torch.randn(p.shape, generator=generator).mul_(0.3).to(p)
    return model


def logits(model):
    return model(input_ids=IDS).logits.detach()


def apart(tested, exact):
    """Largest differences of results in the order of their sizes: names depend on the order of wrappers."""
    pairs = zip(*(sorted(found.values(), key=torch.norm) for found in (tested, exact)), strict=True)
    return [i for i, (ours, value) in enumerate(pairs) if (ours - value).abs().max() > 2e-5 * value.abs().max()]


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "NemotronH"])
def test_the_implementation(name, options):
    model, dense = moe4(name, **options)
    register_experts()
    exact = logits(dense.double())
    model.set_experts_implementation("lora_kernels")
    assert (logits(model) - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_no_stack_of_weights_is_formed(monkeypatch):
    monkeypatch.setitem(MODELS, "Qwen3Moe", {**MODELS["Qwen3Moe"], "num_experts": 32})
    model, found = moe4("Qwen3Moe")[0], {}
    register_experts()
    for way in ("eager", "lora_kernels"):
        model.set_experts_implementation(way)
        with Largest(model) as mode:
            model(input_ids=IDS[:, :4])
        found[way] = mode.elements / (32 * 32 * 16)
    assert found["eager"] >= 1
    assert found["lora_kernels"] < 0.5, found


@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV3"])
def test_target_parameters_of_peft(name):
    """Numbers of the dequantised weights in float64, which PEFT's own forward misses (next test)."""
    model, dense = moe4(name)
    names = names_of(model)
    ours, exact = (drawn_adapters(with_peft(m, names)) for m in (model, dense))
    report = accelerate(ours)
    assert not report.falling_back
    assert not apart(run(ours), run(in_double(exact)))
    assert report.calls() == {FAST: len(names)}


def test_what_a_forward_of_peft_s_own_leaves_is_refused():
    """PEFT 0.21 does not take its parametrization away from a stack that has bitsandbytes' too: each call adds B·A again."""
    model = with_peft(moe4("Mixtral")[0], names_of(moe4("Mixtral")[0]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        first, second = logits(model), logits(model)
    if torch.equal(first, second):
        pytest.skip("a PEFT that takes it away")
    report = accelerate(model)
    assert set(report.falling_back.values()) == {
        "a stack has parametrizations beside bitsandbytes', such as PEFT leaves there after a forward of its own"
    }
    base = model.get_base_model()
    for experts in experts_of(base).values():
        for name in weight_names(experts):
            while len(experts.parametrizations[name]) > 1:
                del experts.parametrizations[name][-1]
    assert not accelerate(model).falling_back


def test_a_report_names_them():
    """Where no adapter is wanted of them."""
    model, _ = moe4("Mixtral")
    report = add_lora(model, LoRAConfig(r=2))
    assert "gate_up_proj[4, 48, 32], down_proj[4, 32, 24] of Parametrized" in str(report)


def adapted(model):
    report = add_lora(model, LoRAConfig(r=3, lora_alpha=6, target_parameters=names_of(model)))
    assert not report.skipped
    return drawn_adapters(model)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["Mixtral", "NemotronH"])
def test_add_lora(name, options):
    """Over the same bytes, and bitsandbytes has them again at the end."""
    model, dense = moe4(name, **options)
    before, keys, kinds = logits(model), list(model.state_dict()), [type(module).__name__ for module in model.modules()]
    codes = {p.data_ptr() for path, p in model.named_parameters() if path.endswith(".original")}
    config = LoRAConfig(r=3, lora_alpha=6, target_parameters=["experts.down_proj", f"experts.{first_of(dense)}"])
    for m in (model, dense):
        assert not add_lora(m, config, quantize="nf4" if m is model else None).skipped
        drawn_adapters(m)
    assert {stack.weight.data_ptr() for stack in model.modules() if isinstance(stack, LoRAStack)} == codes
    assert not apart(run(model), run(in_double(dense)))
    state = {key for key in model.state_dict() if ".lora_" not in key}
    assert state == set(keys)
    remove_lora(model)
    assert [type(module).__name__ for module in model.modules()] == kinds
    assert set(model.state_dict()) == set(keys)
    assert torch.equal(logits(model), before)
    assert {p.data_ptr() for path, p in model.named_parameters() if path.endswith(".original")} == codes


def first_of(model):
    return weight_names(next(iter(experts_of(model).values())))[0]


def test_one_stack_and_the_other_later(tmp_path):
    """A copy's class is the copied one's: neither breaks the other."""
    model, dense = moe4("Mixtral")
    other, before = copy.deepcopy(model), logits(model)
    for m in (model, dense):
        add_lora(m, LoRAConfig(r=3, target_parameters=["experts.down_proj"], init_lora_weights=False))
        drawn_adapters(m)
    assert not apart(run(model), run(in_double(dense)))
    save_merged(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("absmax" in key for key in saved)
    plain = dict(dense.named_parameters())
    for path in experts_of(model):
        assert torch.equal(saved[f"{path}.gate_up_proj"], plain[f"{path}.gate_up_proj"].cpu())
    add_lora(model, LoRAConfig(r=2, target_parameters=["experts.gate_up_proj"]), "second")
    assert len([m for m in model.modules() if isinstance(m, LoRAStack)]) == 4
    assert torch.equal(logits(other), before)
    remove_lora(model)
    assert torch.equal(logits(model), before)


def test_states_both_ways(monkeypatch):
    """bitsandbytes' state loads here, and its replace_parameter_4bit_prequantized takes ours. Rows are whole blocks: others it
    decodes wrongly on a CPU with AVX512.
    """
    monkeypatch.setitem(MODELS, "Mixtral", {**MODELS["Mixtral"], "hidden_size": 64, "intermediate_size": 64})
    model, _ = moe4("Mixtral", compress_statistics=True)
    state, expected = model.state_dict(), logits(model)
    other = moe("Mixtral")
    add_lora(other, LoRAConfig(target_parameters=["experts.down_proj", "experts.gate_up_proj"]), quantize="nf4")
    other.load_state_dict({**other.state_dict(), **state})
    assert torch.allclose(logits(other), expected, atol=1e-6)
    written, again = other.state_dict(), moe("Mixtral")
    for path, experts in experts_of(again).items():
        for name in weight_names(experts):
            key = f"{path}.{name}"
            beside = {k.removeprefix(f"{key}."): v for k, v in written.items() if k.startswith(f"{key}.") and ".lora_" not in k}
            delattr(experts, name)
            experts.register_parameter(name, nn.Parameter(written[key].clone(), requires_grad=False))
            parametrize.replace_parameter_4bit_prequantized(experts, name, beside, written[key].device)
    assert torch.equal(logits(again), expected)


def test_adapters_both_ways(tmp_path):
    """PEFT has the wrappers of such stacks in the other order, and so the keys of its files."""
    model, _ = moe4("Mixtral")
    adapted(model)
    save_adapter(model, tmp_path / "ours")
    theirs = moe4("Mixtral")[0]
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "ours")
    assert not accelerate(theirs).falling_back
    assert torch.allclose(logits(theirs), logits(model), atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    again = moe4("Mixtral")[0]
    assert load_adapter(again, tmp_path / "theirs").active
    assert torch.equal(logits(again), logits(model))


def test_what_cannot_be_taken(monkeypatch):
    """Experts as [in, out], and blocks of two experts: named, and left to the module's own forward, or an error."""
    register_experts()
    monkeypatch.setitem(MODELS, "Mixtral", {"num_local_experts": 4, "intermediate_size": 23})
    for name, reason in (("GptOss", "its experts are [in, out]"), ("Mixtral", "blocks of 64 run over the ends of its experts")):
        model, _ = moe4(name)
        expected = logits(model)
        theirs = with_peft(copy.deepcopy(model), names_of(model)[:1])
        assert reason in str(accelerate(theirs))
        model.set_experts_implementation("lora_kernels")
        with pytest.raises(ValueError, match=r'got a 4-bit stack .* the experts implementation "eager" dequantises'):
            logits(model)
        model.set_experts_implementation("eager")
        with pytest.raises(ValueError, match=r"match no stack of experts; skipped: .*a 4-bit stack"):
            add_lora(model, LoRAConfig(target_parameters=["experts.gate_up_proj"]))
        assert torch.equal(logits(model), expected)
