"""`lora-kernels demo`: fine-tune a causal language model on real text, beside PEFT, and read the adapter back.

The order is: check the input; measure one training step of this package and of PEFT over the same frozen weights;
train; compare held-out loss and a sample before and after; write the adapter, load it into a freshly read base model,
and require bit-equal logits.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..models.config import LoRAConfig
from ..models.surgery import add_lora, load_lora_state_dict, lora_parameters, lora_state_dict
from . import pretrained
from .console import CommandError, Output, require
from .corpus import Corpus, read_text, split
from .demo_report import OURS, PEFT, plot, print_summary
from .measure import interleaved, saved_bytes
from .memory import check_rank, group_layers
from .model_step import loss as model_loss
from .model_step import peft_twin, step

CPU_TOKENS, GPU_TOKENS = 256, 4096  # of one step
MIN_WINDOW, MAX_WINDOW = 16, 512  # tokens of one sequence; four a step where that fits: one alone is a noisy loss
HELD_OUT_BATCH = 4  # windows
EVALUATIONS = 4  # of the held-out loss during training
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 40
TIMED_STEPS = 3


@dataclass(frozen=True)
class Settings:
    """The options of the command, under their names there."""

    model: Path | None
    text: Path | None
    output: Path
    rank: int
    alpha: float
    dropout: float
    steps: int
    tokens_per_step: int | None
    lr: float
    seed: int
    quantize: str | None = None

    def check(self) -> None:
        """Raise CommandError for values that need no model to be seen as wrong."""
        for option, value, ok, expected in (
            ("--rank", self.rank, self.rank >= 1, "at least 1"),
            ("--alpha", self.alpha, 0 < self.alpha < float("inf"), "a positive number"),
            ("--dropout", self.dropout, 0 <= self.dropout <= 1, "a probability in [0, 1]"),
            ("--steps", self.steps, self.steps >= 1, "at least 1"),
            ("--lr", self.lr, 0 < self.lr < float("inf"), "a positive number"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("--quantize", self.quantize, self.quantize in (None, "nf4"), "nf4, or no --quantize"),
        ):
            if not ok:
                raise CommandError(f"{option}: got {value}, expected {expected}")
        if self.tokens_per_step is not None and self.tokens_per_step < MIN_WINDOW:
            raise CommandError(f"--tokens-per-step: got {self.tokens_per_step}, expected at least {MIN_WINDOW}")
        if self.output.exists() and not self.output.is_dir():
            raise CommandError(f"--output: got {self.output}, which is a file; pass a directory")

    @property
    def window(self) -> int:
        """Tokens of one training sequence."""
        return min(max(MIN_WINDOW, (self.tokens_per_step or CPU_TOKENS) // 4), MAX_WINDOW)

    @property
    def windows(self) -> int:
        """Sequences of one step."""
        return (self.tokens_per_step or CPU_TOKENS) // self.window

    @property
    def lora_config(self) -> LoRAConfig:
        return LoRAConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules="all-linear")


def run(settings: Settings, output: Output) -> dict[str, Any]:
    """The whole command; returns what its JSON holds.

    Raises CommandError for bad input, RuntimeError for a lossy round trip of the adapter.
    """
    settings.check()
    require("demo", "transformers", "peft", "safetensors", "matplotlib", *(["bitsandbytes"] if settings.quantize else []))
    started = time.perf_counter()
    text = read_text(settings.text)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if settings.tokens_per_step is None:
        settings = replace(settings, tokens_per_step=GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)
    directory = _model_directory(settings, output)
    vocabulary = _check_adapters_fit(directory, settings)
    tokenizer = pretrained.load_tokenizer(directory)
    corpus = split(text, tokenizer, settings.window, vocabulary)
    _make_output_directory(settings.output)

    model = pretrained.load_model(directory, dtype, device)
    peft_model = peft_twin(model, settings.lora_config, settings.quantize)
    torch.manual_seed(settings.seed)
    report = add_lora(model, settings.lora_config, quantize=settings.quantize)
    output.print(f"{settings.model or pretrained.DEFAULT_MODEL}: {report}", markup=False)
    steps = _compare_steps(model, peft_model, corpus, settings, output)
    del peft_model
    result = _fine_tune(model, tokenizer, corpus, settings, output)
    result["round_trip"] = _round_trip(model, directory, corpus.held_out[:1].to(device), settings)
    result["plot"] = str(plot(result["losses"], result["held_out"], settings.output / "loss.png"))
    result |= {"steps": steps, "device": str(device), "dtype": str(dtype), "seconds": time.perf_counter() - started}
    result["settings"] = asdict(settings)
    print_summary(result, output)
    return result


def _model_directory(settings: Settings, output: Output) -> Path:
    if settings.model is not None:
        pretrained.check_directory(settings.model)
        return settings.model
    if pretrained.default_model_is_cached():
        return pretrained.default_model_directory()
    pretrained.default_model_source()  # a missing wheel is said before anything is announced
    with output.console.status(f"Converting {pretrained.DEFAULT_MODEL} from GGUF, once (about half a minute)"):
        return pretrained.default_model_directory()


def _check_adapters_fit(directory: Path, settings: Settings) -> int:
    """The model's vocabulary size. Adapters are tried on the meta device: a rank too large costs no loading time."""
    model = pretrained.meta_model(directory)
    try:
        add_lora(model, settings.lora_config)
    except (ValueError, TypeError) as error:
        raise CommandError(f"demo: {error}") from error
    check_rank(group_layers(model))
    return model.get_input_embeddings().weight.shape[0]


def _make_output_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output: cannot create {directory}: {error.strerror}") from error


def _compare_steps(
    model: nn.Module, peft_model: nn.Module, corpus: Corpus, settings: Settings, output: Output
) -> dict[str, Any]:
    """Seconds of forward + backward and saved bytes, this package and PEFT in turns on the same batch."""
    device = next(model.parameters()).device
    ids = corpus.batch(settings.windows, torch.Generator().manual_seed(settings.seed)).to(device)
    models = {OURS: model.train(), PEFT: peft_model.train()}
    with output.console.status("Timing a training step beside PEFT"):
        timings = interleaved({name: step(model, ids) for name, model in models.items()}, TIMED_STEPS, warmup=1, device=device)
        saved = {name: saved_bytes(partial(model_loss, it, ids), exclude=[ids, *it.buffers()]) for name, it in models.items()}
    for candidate in models.values():
        candidate.zero_grad(set_to_none=True)
    return {
        name: {
            "step": timings[name].as_dict(),
            "tokens": ids.numel(),
            "saved_bytes": saved[name],
            "adapter_dtype": str(next(p.dtype for p in candidate.parameters() if p.requires_grad)),
        }
        for name, candidate in models.items()
    }


def _fine_tune(model: nn.Module, tokenizer: Any, corpus: Corpus, settings: Settings, output: Output) -> dict[str, Any]:
    """Train, with a greedy sample before and after; the losses by step."""
    prompt = corpus.held_out[:1, :PROMPT_TOKENS]
    with output.console.status("A sample before training"):
        before = _sample(model, tokenizer, prompt)
    losses, held_out = train(model, corpus, settings, output)
    with output.console.status("A sample after training"):
        after = _sample(model, tokenizer, prompt)
    return {
        "losses": losses,
        "held_out": held_out,
        "prompt": tokenizer.decode(prompt[0].tolist()),
        "sample": {"before": before, "after": after},
    }


def train(model: nn.Module, corpus: Corpus, settings: Settings, output: Output) -> tuple[list[float], dict[int, float]]:
    """AdamW on the adapters: (training loss of each step, held-out loss after some numbers of steps, 0 and the last too).

    The seed decides data order and dropout.
    """
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    order = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    evaluate_after = {round(settings.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    losses: list[float] = []
    status = TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]}, held out {task.fields[held_out]}")
    with Progress("training", BarColumn(), status, TimeRemainingColumn(), console=output.console) as progress:
        task = progress.add_task("", total=settings.steps, loss="", held_out="")
        held_out = {0: held_out_loss(model, corpus)}
        for step in range(1, settings.steps + 1):
            model.train()
            loss = model_loss(model, corpus.batch(settings.windows, order).to(parameters[0].device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if step in evaluate_after:
                held_out[step] = held_out_loss(model, corpus)
            latest = next(reversed(held_out.values()))
            progress.update(task, advance=1, loss=f"{losses[-1]:.3f}", held_out=f"{latest:.3f}")
    return losses, held_out


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus) -> float:
    """Mean loss per token over the held-out windows, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    batches = corpus.held_out.split(HELD_OUT_BATCH)
    total = sum(model_loss(model, ids.to(device)).item() * len(ids) for ids in batches)
    return total / len(corpus.held_out)


@torch.no_grad()
def _sample(model: Any, tokenizer: Any, prompt: Tensor) -> str:
    """The greedy continuation of `prompt`."""
    model.eval()
    ids = prompt.to(next(model.parameters()).device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        repetition_penalty=1.2,  # small models repeat themselves without
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return tokenizer.decode(generated[0, ids.shape[1] :].tolist())


@torch.no_grad()
def _round_trip(model: nn.Module, directory: Path, ids: Tensor, settings: Settings) -> dict[str, Any]:
    """Write the adapter, load it into a base model read from disk again, and require the same logits bit for bit."""
    from safetensors.torch import load_file, save_file

    path = settings.output / "adapter.safetensors"
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_state_dict(model).items()}
    save_file(state, path, metadata={"lora_config": json.dumps(asdict(settings.lora_config))})
    expected = model.eval()(input_ids=ids).logits
    first = next(model.parameters())
    fresh = pretrained.load_model(directory, first.dtype, first.device)
    add_lora(fresh, settings.lora_config, quantize=settings.quantize)
    load_lora_state_dict(fresh, load_file(path))
    logits = fresh.eval()(input_ids=ids).logits
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max().item()
        raise RuntimeError(f"adapter round trip: logits differ by up to {difference:.3g} with {path} read back, expected 0")
    return {"adapter": str(path), "adapter_bytes": path.stat().st_size, "logits_bit_equal": True}
