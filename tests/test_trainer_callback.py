"""LoRAKernelsCallback in transformers' Trainer and TRL's, and Axolotl's plugin against a stand-in of its interface."""

import copy
import importlib
import sys
from types import ModuleType

import peft
import pytest
import tiny_models
import torch
from transformers import Trainer, TrainingArguments

from lora_kernels.integrations.trainer import LoRAKernelsCallback


class BasePlugin:
    """What the plugin gets from axolotl.integrations.base: by default no callbacks."""

    def add_callbacks_pre_trainer(self, cfg, model):
        return []


@pytest.fixture
def plugin(monkeypatch):
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.delitem(sys.modules, "lora_kernels.integrations.axolotl", raising=False)
    yield importlib.import_module("lora_kernels.integrations.axolotl").Plugin()
    sys.modules.pop("lora_kernels.integrations.axolotl")


@pytest.fixture
def model():
    tiny = tiny_models.MODELS["llama"]
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.make(), peft.LoraConfig(target_modules=tiny.target_modules, r=4, init_lora_weights=False))


def trainer_of(model, tmp_path, callbacks=()):
    tokens = torch.randint(2, 60, (8, 9), generator=torch.Generator().manual_seed(7))
    settings = {
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "learning_rate": 0.01,
    }
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows, callbacks=list(callbacks))


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_trained(callback, ours, theirs):
    calls = callback.report.calls()
    assert calls.pop("fast") > 0
    assert not calls
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("added", ["given", "later"])
def test_trainer(added, model, tmp_path, capsys):
    plain = trainer_of(copy.deepcopy(model), tmp_path)
    callback = LoRAKernelsCallback()
    trainer = trainer_of(model, tmp_path, [callback] if added == "given" else [])
    assert (callback.report is not None) == (added == "given")
    if added == "later":
        trainer.add_callback(callback)
    check_trained(callback, losses(trainer), losses(plain))
    assert callback.report.blocks.mlps
    losses(trainer)
    assert capsys.readouterr().out.count("LoRA layers fast now") == 1  # not again in a second training


def test_options_are_accelerate_s_and_one_process_prints(model, tmp_path, capsys):
    callback = LoRAKernelsCallback(blocks=False)
    trainer = trainer_of(model, tmp_path)
    trainer.state.is_world_process_zero = False
    trainer.add_callback(callback)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback.report.blocks is None
    assert "LoRA layers" not in capsys.readouterr().out


def test_a_model_without_adapters_is_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="get_peft_model first"):
        trainer_of(tiny_models.MODELS["llama"].make(), tmp_path, [LoRAKernelsCallback()])


def test_axolotl_s_plugin(plugin, model, tmp_path):
    plain = trainer_of(copy.deepcopy(model), tmp_path)
    [callback] = plugin.add_callbacks_pre_trainer(None, model)
    assert isinstance(plugin, BasePlugin)
    check_trained(callback, losses(trainer_of(model, tmp_path, [callback])), losses(plain))


def test_trl_s_own_peft_model(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    import tiny_llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny_llama.write(tmp_path / "model")
    data = datasets.Dataset.from_dict({"text": [tiny_llama.TEXT[i : i + 60] for i in range(0, 480, 60)]})

    def trained(callbacks):
        torch.manual_seed(0)
        arguments = trl.SFTConfig(
            str(tmp_path), max_steps=2, logging_steps=1, max_length=32, report_to=[], use_cpu=True, bf16=False
        )
        trainer = trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(directory),
            arguments,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(directory),
            peft_config=peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"),
            callbacks=callbacks,
        )
        return losses(trainer)

    callback = LoRAKernelsCallback()
    check_trained(callback, trained([callback]), trained([]))
