"""Lightning, Axolotl and LLaMA-Factory take these layers by the line that docs/trainer.md has for each.

They pin other versions of transformers and PEFT, so each has a virtual environment of its own: `make test-trainers`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_llama
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lora_kernels import accelerate

REPORT = "14 of 14 LoRA layers fast now"
AXOLOTL = """
plugins: [lora_kernels.integrations.axolotl.Plugin]
base_model: ./model
datasets: [{{path: ./data.jsonl, ds_type: json, type: completion, field: text}}]
adapter: {adapter}
load_in_4bit: {four_bits}
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_mlp_kernel: false
lora_qkv_kernel: false
lora_o_kernel: false
attn_implementation: eager
sequence_len: 64
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 4
learning_rate: 0.001
optimizer: adamw_torch
lr_scheduler: constant
output_dir: ./out
val_set_size: 0
bf16: false
fp16: false
tf32: false
"""
LLAMAFACTORY = """
import importlib.machinery, sys, types
audio = sys.modules["torchaudio"] = types.ModuleType("torchaudio")  # PyPI's is for CUDA, and nothing is heard here
audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
from llamafactory.train.tuner import run_exp
from lora_kernels.integrations.trainer import LoRAKernelsCallback

arguments = dict(
    model_name_or_path="model", stage="pt", do_train=True, finetuning_type="lora", lora_rank=8, lora_target="all",
    dataset="data", dataset_dir=".", template="empty", cutoff_len=64, output_dir=sys.argv[1], max_steps=4, logging_steps=1,
    per_device_train_batch_size=2, learning_rate=1e-3, seed=1, report_to="none", use_cpu=True, flash_attn="disabled",
)
run_exp(arguments, callbacks=[LoRAKernelsCallback()] if sys.argv[1] == "fast" else [])
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A model and a data set, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_llama.write(tmp_path / "model")
    rows = [{"text": tiny_llama.TEXT[97 * i : 97 * i + 300]} for i in range(32)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def ran(*command: str) -> str:
    """What a command wrote, offline and on the CPU; it has to succeed."""
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "DO_NOT_TRACK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    environment = {**os.environ, **offline, "CUDA_VISIBLE_DEVICES": "", "DISABLE_VERSION_CHECK": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout + done.stderr


def is_trained(adapter: Path) -> bool:
    """Whether PEFT reads this adapter, every B of which is no longer zero."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), adapter)
    return all(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_lightning():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, fast: bool):
            super().__init__()
            torch.manual_seed(0)
            config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
            self.model, self.losses = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), config), []
            self.report = accelerate(self.model) if fast else None

        def training_step(self, batch, index):
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    rows = torch.randint(2, 200, (12, 32), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=2)
    modules = fast, plain = Module(True), Module(False)
    for module in modules:
        trainer = lightning.Trainer(
            max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(module, data)
        trainer.save_checkpoint("checkpoint.ckpt")
    assert fast.report.calls() == {"fast": 14 * 6}
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5)
    assert len({*fast.losses}) == 6
    again = Module.load_from_checkpoint("checkpoint.ckpt", fast=True, weights_only=False)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_axolotl(folder, adapter):
    """Its runs differ among themselves: losses are not compared."""
    four_bits = "true" if adapter == "qlora" else "false"
    (folder / "config.yml").write_text(AXOLOTL.format(adapter=adapter, four_bits=four_bits))
    assert REPORT in ran("-m", "axolotl.cli.train", "config.yml")
    assert is_trained(folder / "out")


def test_llamafactory(folder):
    """Its losses are those without the callback."""
    columns = {"data": {"file_name": str(folder / "data.jsonl"), "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(columns))
    (folder / "train.py").write_text(LLAMAFACTORY)
    losses = {}
    for name in ("fast", "plain"):
        assert (REPORT in ran("train.py", name)) == (name == "fast")
        state = json.loads((folder / name / "trainer_state.json").read_text())
        losses[name] = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-4)
    assert len(losses["fast"]) == 4
    assert is_trained(folder / "fast")
