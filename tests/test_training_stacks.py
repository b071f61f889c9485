"""Accelerated PEFT models in the training stacks that people use: the same losses and adapters as PEFT's own, and all fast."""

import copy

import peft
import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, accelerate, add_lora, lora_parameters, lora_plus_param_groups

FAST = "fast"


def adapted(tiny, **options):
    torch.manual_seed(0)
    model = tiny.make()
    return get_peft_model(model, LoraConfig(target_modules=tiny.target_modules, r=4, lora_alpha=8, **options)).train()


def train(model, tiny, steps=4, lr=0.02):
    """Losses of a few steps on one batch."""
    torch.manual_seed(1)
    batch = tiny.batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = tiny.loss(model(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_all_fast(report):
    calls = report.calls()
    assert calls.pop(FAST) > 0
    assert not calls


@pytest.mark.parametrize("name", tiny_models.MODELS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_models_train_as_with_peft(name):
    if name == "diffusers":
        pytest.importorskip("diffusers")
    tiny = tiny_models.MODELS[name]
    plain = adapted(tiny)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    assert len(report.accelerated) >= 4
    theirs, losses = train(plain, tiny), train(ours, tiny)
    assert theirs[-1] < theirs[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
    check_all_fast(report)


def curve(model, steps=50, seed=0, noise=0.0):
    """Loss over `steps` steps on the same batches, the adapters' start and dropout drawn with `seed`."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    tokens = torch.randint(2, 60, (steps, 2, 9), generator=torch.Generator().manual_seed(7))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in tokens:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
def test_loss_curves_coincide_within_what_two_seeds_of_peft_show(lora_dropout):
    tiny = tiny_models.MODELS["llama"]
    model = adapted(tiny, lora_dropout=lora_dropout)
    ours = copy.deepcopy(model)
    report = accelerate(ours)
    first, second, mine = curve(copy.deepcopy(model)), curve(copy.deepcopy(model), seed=1), curve(ours)
    assert (first - mine).abs().mean() < (first - second).abs().mean()
    if not lora_dropout:
        torch.testing.assert_close(mine, first, rtol=1e-3, atol=0)
    check_all_fast(report)


# ---- transformers.Trainer, TRL, accelerate ----


def dataset(rows=8):
    torch.manual_seed(2)
    return [{name: value[0] for name, value in tiny_models.causal_batch().items()} for _ in range(rows)]


def trainer_arguments(directory, **options):
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 0.02,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **options,
    }


def run_trainer(model, directory, **options):
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(model=model, args=TrainingArguments(**trainer_arguments(directory, **options)), train_dataset=dataset())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CHECKPOINTING = [{}] + [
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for reentrant in (True, False)
]


@pytest.mark.parametrize("options", [*CHECKPOINTING, {"bf16": True}, {**CHECKPOINTING[1], "bf16": True}], ids=str)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_transformers_trainer(tmp_path, options, lora_dropout):
    plain = adapted(tiny_models.MODELS["llama"], lora_dropout=lora_dropout)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    theirs, losses = run_trainer(plain, tmp_path, **options), run_trainer(ours, tmp_path, **options)
    assert len(losses) == 3
    tolerance = 1e-4 if not (lora_dropout or options.get("bf16")) else 0.02
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=tolerance, atol=1e-4)
    check_all_fast(report)
    ours.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "adapter")
    trained = peft.get_peft_model_state_dict(ours)
    assert all(torch.equal(value, trained[key]) for key, value in peft.get_peft_model_state_dict(loaded).items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_with_the_same_dropout_mask(reentrant):
    """Gradients with checkpointing are those without, bit for bit: the mask's seed is drawn from torch's generator."""
    model = adapted(tiny_models.MODELS["llama"], lora_dropout=0.3)
    accelerate(model)
    batch, grads = tiny_models.causal_batch(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        model(**batch).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    import tiny_llama
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny_llama.write(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    data = datasets.Dataset.from_dict({"text": [tiny_llama.TEXT[i : i + 60] for i in range(0, 480, 60)]})

    def run(accelerated):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(directory)
        arguments = trl.SFTConfig(**trainer_arguments(tmp_path / "out", bf16=False), max_length=32)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config
        )
        report = accelerate(trainer.model) if accelerated else None
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], report

    theirs, _ = run(False)
    losses, report = run(True)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=1e-3, atol=1e-4)
    check_all_fast(report)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_s_loop(mixed_precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one per process otherwise, and Trainer has made it
    tiny = tiny_models.MODELS["llama"]
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=True)
    model = adapted(tiny)
    report = accelerate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batch, losses = tiny.batch(), []
    for _ in range(4):
        loss = prepared(**batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert accelerator.unwrap_model(prepared) is model
    check_all_fast(report)


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_torch_compile_of_a_whole_model(lora_dropout):
    tiny = tiny_models.MODELS["llama"]
    plain = adapted(tiny, lora_dropout=lora_dropout)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    compiled = torch.compile(ours, backend="aot_eager")
    theirs, losses = train(plain, tiny, steps=3), train(compiled, tiny, steps=3)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(theirs), rtol=1e-4 if not lora_dropout else 0.1, atol=1e-6)


# ---- LoRA+ ----


@pytest.mark.parametrize("own", [True, False], ids=["add_lora", "peft"])
def test_lora_plus_groups(own):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    if own:
        add_lora(model, LoRAConfig(r=2, target_modules=["0"], lora_bias=True, modules_to_save=["2"]))
        trained = lora_parameters(model)
    else:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], lora_bias=True, modules_to_save=["2"]))
        trained = [p for p in model.parameters() if p.requires_grad]
    groups = lora_plus_param_groups(model, lr=1e-3, ratio=8)
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups]
    assert [group["lr"] for group in groups] == [1e-3, 8e-3, 1e-3]
    assert shapes == [[(2, 6)], [(5, 2), (5,)], [(4, 5), (4,)]]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}
    torch.optim.AdamW(groups)


def test_lora_plus_needs_a_trained_b_and_sane_numbers():
    with pytest.raises(ValueError, match="no trainable lora_B"):
        lora_plus_param_groups(nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="ratio: got 0"):
        lora_plus_param_groups(LoRALinear(2, 2), 1e-3, ratio=0)
