"""transformers' Trainer with add_lora: whole checkpoints and those of adapters alone, interrupted and resumed."""

import shutil

import peft
import pytest
import torch
from pretrained_case import BASES, llama
from torch import nn

from lora_kernels import LoRAConfig, adapter_checkpoints, add_lora, load_adapter, lora_state_dict, set_adapter

transformers = pytest.importorskip("transformers")

CASES = {  # what the model is over, and options of its adapters
    "dense": ("dense", {}),
    "nf4": ("nf4", {}),
    "bnb": ("bnb", {}),
    "head and biases": ("dense", {"modules_to_save": ["lm_head"], "bias": "all"}),
}
every_case = pytest.mark.parametrize("case", CASES)
AS_ALWAYS = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def adapted(tmp_path, case, second=False):
    """A model whose adapters are random, and others at each call."""
    base, config = CASES[case]
    options, quantize = BASES[base]
    model = llama(tmp_path, **options)
    config = LoRAConfig(r=4, lora_dropout=0.2, init_lora_weights=False, target_modules=["q_proj", "down_proj"], **config)
    add_lora(model, config, quantize=quantize)
    if second:
        other = LoRAConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"])
        add_lora(model, other, "sql", quantize=quantize)
    return model


def trainer_of(model, directory, adapters=True, kind=None, **options):
    tokens = torch.randint(2, 60, (16, 9), generator=torch.Generator().manual_seed(7))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    arguments = transformers.TrainingArguments(
        str(directory), **{**settings, **options}, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = (kind or transformers.Trainer)(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    if adapters:
        adapter_checkpoints(trainer)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def files(directory):
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "whole"])
@every_case
def test_resumed_as_if_never_interrupted(case, adapters, tmp_path):
    """The same losses and parameters to the last bit, with dropout, from either kind of checkpoint."""
    model = adapted(tmp_path, case)
    whole = trainer_of(model, tmp_path / "out", adapters)
    whole.train()
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    other = adapted(tmp_path, case)
    resumed = trainer_of(other, tmp_path / "out", adapters)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == 6
    assert losses(resumed) == losses(whole)
    same(lora_state_dict(other), lora_state_dict(model))


@every_case
def test_a_checkpoint_holds_the_adapter_alone_in_peft_s_files(case, tmp_path):
    model = adapted(tmp_path, case)
    trainer = trainer_of(model, tmp_path / "out", max_steps=3)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert files(checkpoint) == AS_ALWAYS | ADAPTER
    trainer.save_model(str(tmp_path / "final"))
    assert files(tmp_path / "final") == ADAPTER | {"training_args.bin"}
    batch = {"input_ids": torch.tensor([[3, 14, 15, 9, 26]])}
    expected = model.eval()(**batch).logits
    for directory in (checkpoint, tmp_path / "final"):
        base, quantize = BASES[CASES[case][0]]
        other = llama(tmp_path, **base)
        load_adapter(other, directory, quantize=quantize)
        assert torch.equal(other.eval()(**batch).logits, expected)
    if CASES[case][0] == "dense":
        theirs = peft.PeftModel.from_pretrained(llama(tmp_path), checkpoint).eval()
        torch.testing.assert_close(theirs(**batch).logits, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("active", ["default", "sql"])
def test_several_adapters(active, tmp_path):
    model = adapted(tmp_path, "nf4", second=True)
    set_adapter(model, active)
    whole = trainer_of(model, tmp_path / "out")
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert files(checkpoint) == AS_ALWAYS | ADAPTER | {f"sql/{name}" for name in ADAPTER}
    other = adapted(tmp_path, "nf4", second=True)
    set_adapter(other, active)
    resumed = trainer_of(other, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    same(lora_state_dict(other), lora_state_dict(model))


@pytest.mark.parametrize("adapters", [True, False], ids=["adapters", "whole"])
@pytest.mark.parametrize("case", ["nf4", "head and biases"])
def test_load_best_model_at_end(case, adapters, tmp_path):
    """Of four evaluations the second is taken for the best."""

    class Judged(transformers.Trainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_loss": abs(self.state.global_step - 2)}

    model = adapted(tmp_path, case)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    trainer = trainer_of(model, tmp_path / "out", adapters, Judged, **options)
    kept = {}

    class Keep(transformers.TrainerCallback):
        def on_save(self, arguments, state, control, **_):
            kept[state.global_step] = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_global_step == 2
    same(lora_state_dict(model), kept[2])
    with pytest.raises(AssertionError):
        same(kept[2], kept[4])


def test_a_checkpoint_of_the_whole_model_is_resumed_too(tmp_path):
    whole = trainer_of(adapted(tmp_path, "nf4"), tmp_path / "out", adapters=False)
    whole.train()
    resumed = trainer_of(adapted(tmp_path, "nf4"), tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert files(tmp_path / "again" / "checkpoint-6") >= ADAPTER


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_of_other_adapters_is_an_error_before_anything_changes(saved, tmp_path):
    trainer_of(adapted(tmp_path, "dense", second=saved), tmp_path / "out", max_steps=3).train()
    model = adapted(tmp_path, "dense", second=not saved)
    before = {name: tensor.clone() for name, tensor in lora_state_dict(model).items()}
    with pytest.raises(ValueError, match=r"checkpoint-3: has the adapters \[.*\], expected those of this model"):
        trainer_of(model, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    same(lora_state_dict(model), before)


def test_a_model_that_is_not_transformers(tmp_path):
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

        def forward(self, x, labels=None):
            y = self.layers(x)[:, 0]
            return {"loss": (y - labels).square().mean(), "logits": y}

    def run(checkpoint=None):
        torch.manual_seed(1)
        model = Regression()
        add_lora(model, LoRAConfig(r=2, lora_dropout=0.2, target_modules=["0", "2"]))
        rows = [{"x": x, "labels": x.sum()} for x in torch.randn(16, 8)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=6, save_steps=3, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        adapter_checkpoints(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return losses(trainer)

    expected = run()
    assert files(tmp_path / "checkpoint-3") == AS_ALWAYS | ADAPTER
    assert run(str(tmp_path / "checkpoint-3")) == expected


def test_trainers_of_other_classes_stay_what_they_are(tmp_path):
    class Mine(transformers.Trainer):
        def log(self, logs, *arguments):
            self.logged = logs
            super().log(logs, *arguments)

    trainer = trainer_of(adapted(tmp_path, "dense"), tmp_path / "out", kind=Mine, max_steps=3)
    adapter_checkpoints(trainer)
    trainer.train()
    assert isinstance(trainer, Mine)
    assert type(trainer).__name__ == "Mine"
    assert trainer.logged
    assert files(tmp_path / "out" / "checkpoint-3") == AS_ALWAYS | ADAPTER


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tiny_llama

    directory = tiny_llama.write(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    data = datasets.Dataset.from_dict({"text": [tiny_llama.TEXT[i : i + 60] for i in range(0, 480, 60)]})

    def run(checkpoint=None):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        add_lora(model, LoRAConfig(r=4, lora_dropout=0.1, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
        arguments = trl.SFTConfig(
            str(tmp_path / "out"),
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            max_length=32,
            use_cpu=True,
            report_to=[],
            bf16=False,
        )
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        adapter_checkpoints(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return losses(trainer)

    expected = run()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert files(checkpoint) >= AS_ALWAYS | ADAPTER | {"tokenizer.json"}
    assert "model.safetensors" not in files(checkpoint)
    assert run(str(checkpoint)) == expected


def test_what_cannot_be_is_an_error_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"trainer: got LlamaForCausalLM, expected a transformers\.Trainer"):
        adapter_checkpoints(adapted(tmp_path, "dense"))
    with pytest.raises(ValueError, match="no LoRA layers; call add_lora first"):
        trainer_of(llama(tmp_path), tmp_path / "out")
    model = llama(tmp_path)
    add_lora(model, LoRAConfig(r=4, init_lora_weights="olora", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'olora' rewrote the base weights"):
        trainer_of(model, tmp_path / "out")
    model = adapted(tmp_path, "dense")
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trains 1 parameters that are no adapter's, such as 'model\.norm\.weight'"):
        trainer_of(model, tmp_path / "out")
    trainer = trainer_of(adapted(tmp_path, "dense"), tmp_path / "out", adapters=False)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="FSDP or DeepSpeed, whose checkpoints"):
        adapter_checkpoints(trainer)
