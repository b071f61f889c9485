"""task_type: PEFT's AutoPeftModels read what save_adapter writes, and the head of a task is trained and saved as in PEFT."""

import json

import peft
import pytest
import torch
import transformers
from adapter_case import CONFIG, WEIGHTS, fill
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, LlamaConfig, T5Config

from lora_kernels import LoRAConfig, add_lora, load_adapter, lora_state_dict, save_adapter
from lora_kernels.models.config import TASK_TYPES
from lora_kernels.models.tasks import HEADS, TABLES

LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=40, pad_token_id=1
)
BERT = BertConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=40, num_labels=2)
T5 = T5Config(d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=1, vocab_size=40, decoder_start_token_id=0, pad_token_id=0)
IDS = torch.tensor([[5, 6, 7, 8]])

# class in transformers, its configuration, target_modules, the task type that is written, the class in PEFT that reads it
MODELS = [
    ("LlamaForCausalLM", LLAMA, ["q_proj", "v_proj"], "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    ("BertLMHeadModel", BERT, ["query"], "CAUSAL_LM", "AutoPeftModelForCausalLM"),
    ("T5ForConditionalGeneration", T5, ["q", "v"], "SEQ_2_SEQ_LM", "AutoPeftModelForSeq2SeqLM"),
    ("LlamaForSequenceClassification", LLAMA, ["q_proj"], "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    ("BertForSequenceClassification", BERT, ["query"], "SEQ_CLS", "AutoPeftModelForSequenceClassification"),
    ("BertForTokenClassification", BERT, ["query"], "TOKEN_CLS", "AutoPeftModelForTokenClassification"),
    ("BertForQuestionAnswering", BERT, ["query"], "QUESTION_ANS", "AutoPeftModelForQuestionAnswering"),
    ("LlamaModel", LLAMA, ["q_proj"], None, "AutoPeftModel"),
    ("LlamaModel", LLAMA, ["q_proj"], None, "AutoPeftModelForFeatureExtraction"),
    ("BertForMaskedLM", BERT, ["query"], None, "AutoPeftModel"),
]


def saved_base(name, config, directory):
    """A model that knows the directory from which it came."""
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(directory)
    return getattr(transformers, name).from_pretrained(directory).eval()


def written(directory):
    return json.loads((directory / CONFIG).read_text())


def output(model):
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **decoder)[0]


@pytest.mark.parametrize(("name", "config", "target_modules", "task", "reader"), MODELS, ids=[f"{m[0]}-{m[4]}" for m in MODELS])
def test_the_auto_class_of_peft_reads_it(tmp_path, name, config, target_modules, task, reader):
    ours = saved_base(name, config, tmp_path / "base")
    heads = [head for head in HEADS.get(task, []) if hasattr(ours, head)]
    add_lora(ours, LoRAConfig(r=4, target_modules=target_modules, modules_to_save=heads))
    fill(parameter for parameter in ours.parameters() if parameter.requires_grad)
    save_adapter(ours, tmp_path / "adapter")
    assert written(tmp_path / "adapter")["task_type"] == task
    theirs = getattr(peft, reader).from_pretrained(tmp_path / "adapter").eval()
    assert type(theirs.get_base_model()).__name__ == name
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "target_modules", "task", "_"), [m for m in MODELS if m[3]], ids=lambda value: str(value)[:30]
)
def test_an_explicit_task_trains_and_saves_what_peft_does(tmp_path, name, config, target_modules, task, _):
    theirs = get_peft_model(
        saved_base(name, config, tmp_path / "base"), LoraConfig(target_modules=target_modules, task_type=task)
    )
    fill(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = saved_base(name, config, tmp_path / "base")
    add_lora(ours, LoRAConfig(target_modules=target_modules, task_type=task))
    assert len([p for p in ours.parameters() if p.requires_grad]) == len([p for p in theirs.parameters() if p.requires_grad])
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    assert written(tmp_path / "ours")["task_type"] == written(tmp_path / "theirs")["task_type"] == task
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()


@pytest.mark.parametrize("task", TASK_TYPES)
def test_a_task_type_is_kept(tmp_path, task):
    base = nn.Sequential(nn.Linear(8, 8))
    save_adapter(add(base, LoRAConfig(target_modules=["0"], task_type=TaskType(task))), tmp_path)
    assert written(tmp_path)["task_type"] == task
    again = nn.Sequential(nn.Linear(8, 8))
    load_adapter(again, tmp_path)
    save_adapter(again, tmp_path / "again")
    assert written(tmp_path / "again")["task_type"] == task


def test_a_config_that_peft_used_names_heads_of_other_models(tmp_path, recwarn):
    """get_peft_model writes all names of the task's heads into the config that it is given."""
    config = LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(saved_base("LlamaForSequenceClassification", LLAMA, tmp_path), config)
    assert set(config.modules_to_save) == {"classifier", "score"}
    ours = saved_base("LlamaForSequenceClassification", LLAMA, tmp_path)
    recwarn.clear()
    add_lora(ours, config)
    assert not [warning for warning in recwarn if "modules_to_save" in str(warning.message)]
    assert ours.score.weight.requires_grad
    with pytest.raises(ValueError, match="modules_to_save: 'classifier' matches no module"):
        add_lora(
            nn.Sequential(nn.Linear(8, 8)),
            LoRAConfig(target_modules=["0"], modules_to_save=["classifier", "score"], task_type="SEQ_CLS"),
        )


def add(model, config):
    add_lora(model, config)
    return model


def test_the_task_types_are_peft_s():
    assert set(TASK_TYPES) == {task.value for task in TaskType}
    assert {*TABLES, "FEATURE_EXTRACTION"} == set(TASK_TYPES)


def test_an_unknown_task_type():
    with pytest.raises(ValueError, match="task_type: got 'CAUSAL', expected one of CAUSAL_LM, SEQ_2_SEQ_LM"):
        LoRAConfig(task_type="CAUSAL")


def test_without_its_head_an_adapter_is_of_no_task_for_peft_could_not_read_it(tmp_path):
    ours = saved_base("BertForSequenceClassification", BERT, tmp_path / "base")
    add_lora(ours, LoRAConfig(target_modules=["query"]))
    fill(parameter for parameter in ours.parameters() if parameter.requires_grad)
    save_adapter(ours, tmp_path / "adapter")
    config = written(tmp_path / "adapter")
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(output(theirs), output(ours), rtol=1e-4, atol=1e-5)


def test_a_file_without_the_head_of_its_task_gets_none(tmp_path):
    """As adapters are that were put into a model without PEFT's model for the task around it."""
    ours = saved_base("BertForSequenceClassification", BERT, tmp_path / "base")
    add_lora(ours, LoRAConfig(target_modules=["query"], task_type="SEQ_CLS"))
    save_adapter(ours, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    save_file({key: value for key, value in load_file(file).items() if "classifier" not in key}, file)
    config = {**written(tmp_path / "adapter"), "modules_to_save": None}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    fresh = saved_base("BertForSequenceClassification", BERT, tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter")
    assert not [key for key in lora_state_dict(fresh) if "classifier" in key]


def test_a_sharded_model_is_of_its_own_class(tmp_path):
    """fully_shard gives a model a class of its own, made for it, which nobody can import."""
    ours = add(saved_base("LlamaModel", LLAMA, tmp_path / "base"), LoRAConfig(target_modules=["q_proj"]))
    ours.__class__ = type("FSDPLlamaModel", (transformers.LlamaModel,), {})
    save_adapter(ours, tmp_path / "adapter")
    mapping = {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama.modeling_llama"}
    assert written(tmp_path / "adapter")["auto_mapping"] == mapping
