"""accelerate(model) with fused blocks: PEFT's own outputs and gradients, its methods, and the two reports."""

import copy
import pickle

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from blocks_case import ALL, CASES, FUSED, SOME, check_same, results
from peft import LoraConfig, get_peft_model
from peft_model import FAST
from tiny_models import llama

from lora_kernels import accelerate, fuse_blocks, restore, unfuse_blocks


def peft_model(targets=ALL, make=CASES["llama"].make, **options):
    torch.manual_seed(0)
    options = {"target_modules": targets, "r": 4, "init_lora_weights": False, **options}
    return get_peft_model(make().double(), LoraConfig(**options), autocast_adapter_dtype=False).train()


BATCH = CASES["llama"].batch()


@pytest.mark.parametrize("targets", [ALL, SOME, ["k_proj"], ["gate_proj", "o_proj"]], ids=str)
def test_outputs_and_gradients_are_peft_s(targets):
    model = peft_model(targets)
    expected = results(model, BATCH)
    report = accelerate(model)
    check_same(results(model, BATCH), expected)
    assert report.calls() == {FAST: len(report.accelerated)}
    attention, mlp = any(name[0] in "qkv" for name in targets), any(name[0] in "gud" for name in targets)
    assert (len(report.blocks.groups), len(report.blocks.mlps)) == (2 * attention, 2 * mlp)
    assert report.blocks.calls() == {FUSED: 2 * attention + 2 * mlp}
    restore(model)
    check_same(results(model, BATCH), expected)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bert", "vit"])
def test_other_models(name):
    case = CASES[name]
    model = peft_model(case.targets, case.make)
    expected = results(model, case.batch())
    report = accelerate(model)
    check_same(results(model, case.batch()), expected)
    assert report.calls() == {FAST: len(report.accelerated)}
    assert report.blocks.calls() == {FUSED: 2 * (case.groups + case.mlps)}


def test_what_accelerate_says():
    model = peft_model()
    assert str(accelerate(model)) == "14 of 14 LoRA layers fast now\n  fused blocks: 2 × {q_proj,k_proj,v_proj}, 2 MLPs"
    report = accelerate(model, blocks=False)
    assert report.blocks is None
    assert str(report) == "14 of 14 LoRA layers fast now"
    results(model, BATCH)
    assert report.calls() == {FAST: 14}
    assert fuse_blocks(model).calls() == {FUSED: 0}


def test_a_peft_model_needs_accelerate_first():
    with pytest.raises(ValueError, match="or accelerate for a PeftModel"):
        fuse_blocks(peft_model())


def test_restore_leaves_nothing():
    model = peft_model()
    before = [(type(m), sorted(vars(m)), len(m._forward_hooks)) for m in model.modules()]
    text, names = repr(model), list(model.state_dict())
    accelerate(model)
    accelerate(model)
    assert list(model.state_dict()) == names
    restore(model)
    counters = {"_lora_kernels_calls"}
    assert [(type(m), sorted(vars(m).keys() - counters), len(m._forward_hooks)) for m in model.modules()] == before
    assert repr(model) == text


def test_peft_s_methods(tmp_path):
    plain, ours = peft_model(SOME), peft_model(SOME)
    report = accelerate(ours)

    def same():
        torch.testing.assert_close(ours(**BATCH).logits, plain(**BATCH).logits, rtol=1e-9, atol=1e-9)

    same()
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(peft_model().unload(), tmp_path)
    torch.testing.assert_close(loaded(**BATCH).logits, plain(**BATCH).logits, rtol=1e-6, atol=1e-6)
    for model in (plain, ours):
        torch.manual_seed(4)
        model.add_adapter("other", LoraConfig(target_modules=ALL, r=2, init_lora_weights=False))
    same()
    assert accelerate(ours).blocks.mlps == report.blocks.mlps
    for model in (plain, ours):
        model.set_adapter("other")
    same()
    for model in (plain, ours):
        model.base_model.set_adapter(["default", "other"])
    same()
    assert report.blocks.calls()["several active adapters"] > 0
    with plain.disable_adapter(), ours.disable_adapter():
        same()
    assert report.blocks.calls()["adapters are disabled"] > 0
    for model in (plain, ours):
        model.set_adapter("default")
        model.merge_adapter()
    same()
    assert report.blocks.calls()["adapters are merged"] > 0
    for model in (plain, ours):
        model.unmerge_adapter()
        model.delete_adapter("other")
    before = report.blocks.calls()[FUSED]
    same()
    assert report.blocks.calls()[FUSED] > before
    plain, ours = plain.merge_and_unload(), ours.merge_and_unload()
    same()
    unfuse_blocks(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]


def test_layers_that_peft_wraps_later():
    model = CASES["llama-some"].make().double()
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False), autocast_adapter_dtype=False)
    accelerate(model)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    fused = results(model, BATCH)  # q_proj is PEFT's own now, around a layer that was a plain member
    report = accelerate(model)
    check_same(results(model, BATCH), fused)
    assert report.blocks.calls()[FUSED] == 4
    restore(model)
    check_same(results(model, BATCH), fused)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies(copier):
    model = peft_model()
    accelerate(model)
    expected = results(model, BATCH)
    twin = copier(model)
    check_same(results(twin, BATCH), expected)
    assert accelerate(twin).blocks.calls() == {FUSED: 8}


def test_dropout_keeps_the_share_of_peft_s():
    """In the mean over many masks, the result of a layer with dropout is that without."""
    model = peft_model(["gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"], lora_dropout=0.2)
    accelerate(model)
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 3, 32, dtype=torch.float64)
    q = torch.stack([attention.q_proj(x) for _ in range(2000)])
    model.eval()
    assert ((q.mean(0) - attention.q_proj(x)).abs() <= 6 * q.std(0) / 2000**0.5).all()


def test_hooks_of_accelerate_s_on_members_and_mlps():
    model = peft_model(SOME)
    expected = results(model, BATCH)
    report = accelerate(model)
    for layer in model.base_model.model.model.layers:
        for module in (layer.self_attn.k_proj, layer.self_attn.q_proj, layer.mlp, layer.mlp.up_proj):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    check_same(results(model, BATCH), expected)
    assert report.calls() == {FAST: 6}
    assert report.blocks.calls() == {
        FUSED: 0,
        "accelerate's hooks move the layer's tensors": 6,
        "a member's forward was replaced on the instance": 2,
    }
    again = accelerate(model)
    assert not again.skipped
    assert set(again.blocks.skipped.values()) == {"its forward was replaced on the instance"}
    restore(model)
    check_same(results(model, BATCH), expected)
    remove_hook_from_submodules(model)
    check_same(results(model, BATCH), expected)


def test_4_bit_models():
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    assert bnb
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        llama(hidden_size=64, intermediate_size=128).save_pretrained(directory)  # whole blocks: bitsandbytes
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = LlamaForCausalLM.from_pretrained(directory, quantization_config=quantization, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=SOME, init_lora_weights=False)).train()
    expected = results(model, BATCH)
    report = accelerate(model)
    check_same(results(model, BATCH), expected, tolerance=1e-4)
    assert report.blocks.calls() == {FUSED: 4}
    with torch.autocast("cpu", torch.bfloat16):
        restore(model)
        expected = results(model, BATCH)
        report = accelerate(model)
        check_same(results(model, BATCH), expected, tolerance=0.05)
    assert report.blocks.calls()[FUSED] == 4
