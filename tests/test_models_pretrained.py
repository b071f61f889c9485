"""save_pretrained of a transformers model with LoRA layers: what transformers, this package and PEFT read of it."""

import copy
import gc
import json
import pickle
import weakref

import peft
import pytest
import tiny_models
import torch
from pretrained_case import BASES, IDS, TARGETS, adapted, again, bnb, in_4_bits, linears, llama, same_linears, same_states
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_kernels import (
    LoRAConfig,
    add_lora,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained wrote the model without its adapters")


@pytest.mark.parametrize("base", BASES)
def test_from_pretrained_reads_the_model_and_load_adapter_its_adapters(base, tmp_path):
    """Twice: what was read is adapted, saved and read again."""
    model = adapted(tmp_path, base)
    expected = model(IDS).logits
    set_adapter(model, None)
    plain = model(IDS).logits
    set_adapter(model, "default")
    for directory in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(directory)
        read = again(directory)
        same_linears(linears(model), linears(read))
        assert torch.equal(read(IDS).logits, plain)
        packed = [path for path, module in read.named_modules() if type(module) is bnb.nn.Linear4bit]
        assert (packed == []) == (base == "dense")
        with pytest.raises(ValueError, match="no LoRA layers"):
            lora_state_dict(read)
        load_adapter(read, directory / "adapters")
        assert torch.equal(read(IDS).logits, expected)
        model = read


@pytest.mark.parametrize("base", BASES)
def test_saving_changes_nothing_of_the_model(base, tmp_path):
    model = adapted(tmp_path, base)
    state, config, own = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict()), set(vars(model))
    model.save_pretrained(tmp_path / "out")
    assert model.config.to_dict() == config
    assert set(vars(model)) == own
    assert same_states(model, state)


def test_an_adapter_without_a_folder_of_its_own_is_refused_before_anything_is_written(tmp_path):
    model = adapted(tmp_path, "dense")
    add_lora(model, LoRAConfig(**TARGETS), "a/")
    with pytest.raises(ValueError, match="adapter_name: got 'a/', which is no name of a folder"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb"])
def test_adapters_of_every_kind_are_saved_in_peft_s_files(base, tmp_path):
    """Two adapters, a head and a norm trained in copies: the originals are in the model, the copies in the adapters."""
    model = adapted(tmp_path, base, modules_to_save=["lm_head", "model.norm"])
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, target_modules=["v_proj"]), "sql", quantize=BASES[base][1])
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    set_adapter(model, None)
    plain = model(IDS).logits
    expected = {}
    for name in ("sql", "default"):
        set_adapter(model, name)
        expected[name] = model(IDS).logits
    model.save_pretrained(tmp_path / "out")
    read = again(tmp_path / "out")
    assert torch.equal(read(IDS).logits, plain)
    for name in ("default", "sql"):
        load_adapter(read, tmp_path / "out" / "adapters", name)
        set_adapter(read, name)
        assert torch.equal(read(IDS).logits, expected[name]), name
    theirs = peft.PeftModel.from_pretrained(again(tmp_path / "out"), tmp_path / "out" / "adapters").train()
    torch.testing.assert_close(theirs(IDS).logits, expected["default"], rtol=0.05, atol=0.05)


def test_a_checkpoint_of_this_package_is_read_as_bitsandbytes_own(tmp_path):
    """The file of an nf4 base has the very keys and configuration of a model that bitsandbytes quantised."""
    ours = adapted(tmp_path, "nf4", target_modules="all-linear")
    ours.save_pretrained(tmp_path / "ours")
    options = in_4_bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = llama(tmp_path, quantization_config=options)
    theirs.save_pretrained(tmp_path / "theirs")
    same_linears(linears(again(tmp_path / "ours")), linears(theirs))
    a, b = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert a["quantization_config"].pop("llm_int8_skip_modules") == ["lm_head"]
    assert b["quantization_config"].pop("llm_int8_skip_modules") is None, "which means the head"
    assert a == b


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("everything", [True, False])
def test_other_architectures(name, everything, tmp_path):
    """Conv1D; a head that is not a language model's; an encoder and a decoder. All layers in 4 bits, or one kind of them."""
    tiny = tiny_models.MODELS[name]
    model = tiny.make().eval()
    some = {"gpt2": ["c_fc"], "bert": ["query"], "t5": ["q"]}[name]
    add_lora(model, LoRAConfig(target_modules="all-linear" if everything else some), quantize="nf4")
    batch = tiny.batch()
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).train()
    same_linears(linears(model), linears(read))
    torch.testing.assert_close(read.eval()(**batch).logits, model(**batch).logits, rtol=2e-2, atol=2e-2)


def with_pissa():
    model = tiny_models.llama()
    add_lora(model, LoRAConfig(init_lora_weights="pissa", r=4, target_modules=["q_proj"]))
    return model


def with_a_second_adapter_that_diverged():
    model = tiny_models.llama()
    add_lora(model, LoRAConfig(target_modules=["q_proj"]))
    add_lora(model, LoRAConfig(target_modules=["v_proj"]), "second")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B["second"][0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (with_pissa, "'pissa' rewrote the base weights"),
        (with_a_second_adapter_that_diverged, "adapter 'second': nothing was written, 1 of its tensors are lost"),
    ],
)
def test_what_the_files_cannot_say_is_an_error_before_anything_is_written(make, words, tmp_path):
    """Unless a state is given, as by Trainer: that is written, with a warning, and read by a model made in the same way."""
    model = make()
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=f"only load_state_dict of a model made in the same way .*{words}"):
        model.save_pretrained(tmp_path / "out", state_dict=None)
    assert not (tmp_path / "out" / "adapters").exists()
    other = make()
    other.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)  # tied weights are written once
    assert same_states(other, model.state_dict())


def test_codes_stored_as_several_dtypes_are_an_error(tmp_path):
    model = llama(tmp_path, quantization_config=in_4_bits(bnb_4bit_quant_storage="bfloat16"))
    add_lora(model, LoRAConfig(target_modules=["lm_head"]), quantize="nf4")
    with pytest.raises(ValueError, match=r"stored as torch\.bfloat16, torch\.uint8, expected one dtype"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def in_8_bits(tmp_path):
    return llama(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("merged", [False, True])
def test_layers_that_others_quantised_stay_so(merged, tmp_path):
    """A dense head is adapted beside layers in 8 bits."""
    model = in_8_bits(tmp_path)
    add_lora(model, LoRAConfig(r=4, init_lora_weights=False, target_modules=["lm_head"]))
    if merged:
        merge_lora(model)
    else:
        set_adapter(model, None)
    model.save_pretrained(tmp_path / "out")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(read.model.layers[0].mlp.up_proj) is bnb.nn.Linear8bitLt
    assert torch.equal(read.eval()(IDS).logits, model.eval()(IDS).logits)


def test_two_quantisations_are_an_error_before_anything_is_written(tmp_path):
    model = in_8_bits(tmp_path)
    add_lora(model, LoRAConfig(target_modules=["lm_head"]), quantize="nf4")
    with pytest.raises(ValueError, match="lm_head: in 4 bits beside layers that are quantised in another way"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_begin_or_end_other_names(tmp_path):
    """transformers takes a name in llm_int8_skip_modules for the beginning and for the end of others."""
    model = llama(tmp_path)
    model.model.layers[0].self_attn.q_proj_norm = nn.Linear(2, 2)
    add_lora(model, LoRAConfig(target_modules=["q_proj_norm"]), quantize="nf4")
    from transformers.quantizers.quantizers_utils import should_convert_module

    from lora_kernels.models.quantization_config import quantization_config

    skipped = quantization_config(model).llm_int8_skip_modules
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) or hasattr(module, "to_linear")]
    assert [path for path in paths if should_convert_module(path, skipped)] == ["model.layers.0.self_attn.q_proj_norm"]


@pytest.mark.parametrize("base", BASES)
def test_a_merged_model_is_dense(base, tmp_path):
    """It loads without bitsandbytes, with the merged model's results; unmerged, the model is as it was."""
    model = adapted(tmp_path, base, modules_to_save=["model.norm"])
    state, own = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    merge_lora(model)
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "adapters").exists()
    read = again(tmp_path / "out")
    assert all(type(module) is nn.Linear for module in read.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(IDS).logits, model.eval()(IDS).logits, rtol=0.05, atol=0.05)
    unmerge_lora(model)
    assert model.config.to_dict() == own
    assert same_states(model, state)


@pytest.mark.parametrize("base", ["dense", "nf4", "bnb"])
def test_remove_lora_gives_transformers_own_method_back(base, tmp_path):
    model = adapted(tmp_path, base)
    options, _ = BASES[base]
    untouched = set(vars(llama(tmp_path, **options)))
    remove_lora(model)
    assert set(vars(model)) == untouched
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(again(tmp_path / "out")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_a_copy_saves_itself(base, copied, tmp_path):
    model = adapted(tmp_path, base)
    other = copied(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        for parameter in lora_parameters(model):
            parameter.zero_()
    expected = other(IDS).logits
    other.save_pretrained(tmp_path / "out")
    read = again(tmp_path / "out")
    load_adapter(read, tmp_path / "out" / "adapters")
    assert torch.equal(read(IDS).logits, expected)
    remove_lora(other)
    assert type(other).save_pretrained is type(llama(tmp_path)).save_pretrained
    assert type(model).save_pretrained is not type(other).save_pretrained


def test_a_deleted_model_is_freed_at_once(tmp_path):
    model = adapted(tmp_path, "nf4")
    weight = weakref.ref(model.model.embed_tokens.weight)
    gc.collect()
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_state_dict_that_is_given_is_written_as_it_is(tmp_path):
    """As accelerate and Trainer call it: an adapted model made in the same way reads it."""
    model = adapted(tmp_path, "nf4")
    model.save_pretrained(tmp_path / "out", state_dict=None)
    with pytest.warns(UserWarning, match="that are not the model's own"):
        model.save_pretrained(tmp_path / "head", state_dict={"lm_head.weight": model.lm_head.weight.detach()})
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert load_file(tmp_path / "head" / "model.safetensors").keys() == {"lm_head.weight"}
    other = adapted(tmp_path, "nf4")
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    load_adapter(llama(tmp_path), tmp_path / "out" / "adapters")
    assert not (tmp_path / "head" / "adapters").exists()


def test_it_says_where_the_adapters_are(tmp_path):
    model = adapted(tmp_path, "dense")
    with pytest.warns(UserWarning, match=r"without its adapters to .*out, and default to .*adapters, for load_adapter"):
        model.save_pretrained(tmp_path / "out")


def test_models_that_are_not_transformers_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    before = set(vars(model))
    add_lora(model, LoRAConfig(target_modules=["0"]))
    assert set(vars(model)) - before == {"_lora_state"}
