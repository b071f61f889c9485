"""Trainers with adapter_checkpoints that save the whole model, and directories that hold checkpoints beside an adapter."""

import pytest
import torch
from pretrained_case import IDS, again
from safetensors.torch import load_file
from test_trainer import ADAPTER, AS_ALWAYS, adapted, files, same, trainer_of
from torch import nn

from lora_kernels import LoRAConfig, adapter_checkpoints, add_lora, lora_state_dict, merge_lora, remove_lora

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "merged"])
@pytest.mark.parametrize("case", ["dense", "nf4"])
def test_after_merging_save_model_writes_the_model(case, removed, tmp_path):
    """Into a directory that is not there, and into one with an adapter, which must not stay beside the merged weights."""
    model = adapted(tmp_path, case)
    trainer = trainer_of(model, tmp_path / "out", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "before"))
    merge_lora(model)
    if removed:
        remove_lora(model)
    expected = model.eval()(IDS).logits
    for name in ("new", "before"):
        trainer.save_model(str(tmp_path / name))
        assert not files(tmp_path / name) & ADAPTER
        torch.testing.assert_close(again(tmp_path / name).eval()(IDS).logits, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("removed", [True, False], ids=["removed", "merged"])
def test_after_merging_a_model_that_is_not_transformers(removed, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, target_modules=["0", "2"]))
    trainer = transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    adapter_checkpoints(trainer)
    merge_lora(model)
    weight = model[0].weight.detach().clone()
    if removed:
        remove_lora(model)
    trainer.save_model(str(tmp_path / "out"))
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert torch.equal(state["0.weight"], weight)


def test_what_was_thawed_later_makes_it_a_checkpoint_of_the_whole_model(tmp_path):
    model = adapted(tmp_path, "dense")
    trainer = trainer_of(model, tmp_path / "out", max_steps=3)
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"holds the whole model, .* trains 1 parameters .* such as 'model\.norm\.weight'"):
        trainer.train()
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "model.safetensors")
    assert torch.equal(saved["model.norm.weight"], model.model.norm.weight)
    other = adapted(tmp_path, "dense")
    resumed = trainer_of(other, tmp_path / "again", max_steps=3)
    other.model.norm.weight.requires_grad_(True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    same(other.state_dict(), model.state_dict())


def test_the_output_directory_is_read_without_the_checkpoints_in_it(tmp_path):
    """save_model() writes the adapter beside them."""
    model = adapted(tmp_path, "dense")
    trainer = trainer_of(model, tmp_path / "out")
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    other = adapted(tmp_path, "dense")
    trainer = trainer_of(other, tmp_path / "again")
    trainer._load_from_checkpoint(str(tmp_path / "out"))
    same(lora_state_dict(other), lora_state_dict(model))
    assert files(tmp_path / "out" / "checkpoint-3") == AS_ALWAYS | ADAPTER
