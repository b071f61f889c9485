"""Adapters of models whose vocabulary was resized: their files have the embedding and the head, whose new rows are random."""

import warnings

import pytest
import torch
from adapter_case import CONFIG, WEIGHTS, fill
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import llama
from transformers import AutoModelForCausalLM

from lora_kernels import LoRAConfig, add_lora, load_adapter, lora_parameters, remove_lora, save_adapter, set_adapter

IDS = torch.tensor([[5, 6, 61, 62]])  # the last two are new tokens
EMBEDDINGS = {f"base_model.model.{path}.weight" for path in ("model.embed_tokens", "lm_head")}


@pytest.fixture(params=[False, True], ids=["", "tied"])
def base(tmp_path, request):
    """Makes the checkpoint's model with `rows` tokens; rows that the checkpoint lacks are others each time."""
    torch.manual_seed(0)
    llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")

    def make(rows=63):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        if rows != model.config.vocab_size:
            model.resize_token_embeddings(rows)
        return model

    return make


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        yield


def peft_adapter(model, directory, **options):
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)).eval()
    fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(directory)
    return theirs


def own_adapter(model, **options):
    add_lora(model, LoRAConfig(**{"r": 4, "target_modules": ["q_proj"], **options}))
    fill(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model


def logits(model):
    return model(IDS).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("present", [False, True])
def test_peft_s_file_on_a_resized_model(base, tmp_path, present):
    theirs = peft_adapter(base(), tmp_path / "theirs")
    plain = base()
    ours = own_adapter(plain) if present else plain
    before = {key: value.clone() for key, value in base().state_dict().items()}
    own_rows = ours.get_input_embeddings().weight.detach().clone()
    load_adapter(ours, tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    assert {p.shape for p in lora_parameters(ours)} == {(4, 32), (32, 4)}  # the embeddings stay frozen
    save_adapter(ours, tmp_path / "ours")
    saved = [load_file(tmp_path / which / WEIGHTS) for which in ("ours", "theirs")]
    assert saved[0].keys() == saved[1].keys() > EMBEDDINGS
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])
    load_adapter(ours, tmp_path / "ours")
    close(logits(ours), logits(theirs))
    set_adapter(ours, None)
    assert torch.equal(ours.get_input_embeddings().weight, own_rows)  # the base model was not written to
    remove_lora(ours)
    assert ours.state_dict().keys() == before.keys()
    assert torch.equal(ours.get_input_embeddings().weight, own_rows)


def test_our_file_of_a_resized_model(base, tmp_path):
    ours = own_adapter(base())
    save_adapter(ours, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() > EMBEDDINGS
    again = base()
    load_adapter(again, tmp_path / "ours")
    close(logits(again), logits(ours))
    close(logits(PeftModel.from_pretrained(base(), tmp_path / "ours").eval()), logits(ours))


@pytest.mark.parametrize("rows", [60, 64])
@pytest.mark.parametrize("writer", [peft_adapter, lambda model, directory: save_adapter(own_adapter(model), directory)])
def test_a_model_of_another_size(base, tmp_path, rows, writer):
    writer(base(), tmp_path / "saved")
    other = base(rows)
    with pytest.raises(ValueError, match=rf"has 63 rows, and this model's {rows}: .*call model.resize_token_embeddings\(63\)"):
        load_adapter(other, tmp_path / "saved")
    assert not hasattr(other, "_lora_state")
    if rows == 60:
        other.resize_token_embeddings(63)
        load_adapter(other, tmp_path / "saved")


def test_another_base_model(base, tmp_path):
    """Its first rows are others too: not what resizing does."""
    peft_adapter(base(), tmp_path / "saved")
    other = base()
    fill([other.get_input_embeddings().weight])
    with pytest.raises(ValueError, match="holds another base weight than this model's: it belongs to another model; or"):
        load_adapter(other, tmp_path / "saved")


def test_embeddings_that_are_trained_are_saved_once_and_stay_trained(base, tmp_path):
    ours = own_adapter(base(), modules_to_save=["embed_tokens", "lm_head"])
    save_adapter(ours, tmp_path / "ours")
    again = base()
    load_adapter(again, tmp_path / "ours")
    close(logits(again), logits(ours))
    assert again.get_input_embeddings().weight.requires_grad


def test_an_adapted_head(base, tmp_path):
    """PEFT takes the head from the file; here it is the frozen weight of a LoRA layer, which loading does not write to."""
    ours = own_adapter(base(), target_modules=["q_proj", "lm_head"])
    save_adapter(ours, tmp_path / "ours")
    close(logits(PeftModel.from_pretrained(base(), tmp_path / "ours").eval()), logits(ours))
    again = base()
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight' holds another base weight .* copy it from the file"):
        load_adapter(again, tmp_path / "ours")
    saved = load_file(tmp_path / "ours" / WEIGHTS)
    with torch.no_grad():
        again.get_output_embeddings().weight.copy_(saved["base_model.model.lm_head.base_layer.weight"])
    load_adapter(again, tmp_path / "ours")
    close(logits(again), logits(ours))


def test_a_vocabulary_that_stayed_is_not_saved(base, tmp_path):
    save_adapter(own_adapter(base(60)), tmp_path / "ours")
    assert not load_file(tmp_path / "ours" / WEIGHTS).keys() & EMBEDDINGS


def test_a_checkpoint_that_is_gone_is_said(base, tmp_path):
    ours = own_adapter(base())
    (tmp_path / "base" / "config.json").unlink()
    with pytest.warns(UserWarning, match="cannot be read, so it is taken that resize_token_embeddings was not called"):
        save_adapter(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / CONFIG).is_file()


def test_a_trained_row_of_a_checkpoint_is_brought_as_well(base, tmp_path):
    """PEFT takes the whole of what the file has, old rows too."""
    peft_adapter(base(60), tmp_path / "saved")
    file = tmp_path / "saved" / WEIGHTS
    changed = base(60).get_input_embeddings().weight.detach().clone()
    changed[7] += 1
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": changed}, file, {"format": "pt"})
    ours = base(60)
    load_adapter(ours, tmp_path / "saved")
    assert torch.equal(ours.get_input_embeddings().weight, changed)
