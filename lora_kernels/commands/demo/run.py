"""`lora-kernels demo`: fine-tune a causal language model on real text, beside PEFT, and read the adapter back.

The order is: check the input; adapt the model and fuse its blocks; measure one training step of it and of PEFT over the same
frozen weights; train; compare held-out loss and a sample before and after; write the adapter, read it back here and with
PEFT, and require the same logits (round_trip.py).
"""

import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.blocks import fuse_blocks
from ...models.surgery import add_lora
from .. import pretrained
from ..bench.peers import OURS, PEFT
from ..console import CommandError, Output, make_writable, require, write_whole
from ..environment import environment
from ..layer_shapes import adapt
from ..measure import saved_bytes
from ..model_step import loss as model_loss
from ..model_step import peft_twin, step
from ..timing import interleaved
from .corpus import Corpus, read_text, split
from .page import demo_page
from .ranks import kept_ranks
from .report import plot, print_summary
from .round_trip import round_trip
from .settings import CPU_TOKENS, GPU_TOKENS, Settings
from .training import sample, train

PROMPT_TOKENS = 16
TIMED_STEPS = 3


def run(settings: Settings, output: Output) -> dict[str, Any]:
    """The whole command; returns what its JSON holds.

    Raises CommandError for bad input, RuntimeError for a lossy round trip of the adapter.
    """
    settings.check()
    require("transformers", "peft", "safetensors", "matplotlib", *(["bitsandbytes"] if settings.quantize else []))
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
    make_writable(settings.output, "--output")

    model = pretrained.load_model(directory, dtype, device)
    peft_model = _peft_model(model, settings)
    torch.manual_seed(settings.seed)
    report = add_lora(model, settings.lora_config, quantize=settings.quantize)
    output.print(f"{settings.model or pretrained.DEFAULT_MODEL}: {report}", markup=False)
    blocks = fuse_blocks(model)
    output.print(str(blocks), markup=False)
    steps = _compare_steps(model, peft_model, corpus, settings, output)
    del peft_model
    result = _fine_tune(model, tokenizer, corpus, settings, output)
    with output.status("Reading the adapter back, with PEFT too"):
        result["round_trip"] = round_trip(model, directory, corpus.held_out[:1].to(device), settings)
    result["plot"] = str(plot(result["losses"], result["held_out"], settings.output / "loss.png"))
    result["blocks"] = {"groups": blocks.groups, "mlps": blocks.mlps, "skipped": blocks.skipped, "calls": blocks.calls()}
    result |= {"steps": steps, "device": str(device), "dtype": str(dtype), "seconds": time.perf_counter() - started}
    result |= {"settings": asdict(settings), "environment": environment(), "page": str(settings.output / "report.html")}
    write_whole(Path(result["page"]), demo_page(result), "--output")
    print_summary(result, output)
    return result


def _model_directory(settings: Settings, output: Output) -> Path:
    if settings.model is not None:
        pretrained.check_directory(settings.model)
        return settings.model
    if pretrained.default_model_is_cached():
        return pretrained.default_model_directory()
    pretrained.default_model_source()  # a missing wheel is said before anything is announced
    with output.status(f"Converting {pretrained.DEFAULT_MODEL} from GGUF, once (about half a minute)"):
        return pretrained.default_model_directory()


def _check_adapters_fit(directory: Path, settings: Settings) -> int:
    """The model's vocabulary size. Adapters are tried on the meta device: a model without layers for them is not loaded."""
    model = pretrained.meta_model(directory)
    adapt(model, settings.lora_config, "--model")
    return model.get_input_embeddings().weight.shape[0]


def _peft_model(model: nn.Module, settings: Settings) -> nn.Module:
    try:
        return peft_twin(model, settings.lora_config, settings.quantize)
    except ValueError as error:  # as for experts in one parameter with dropout
        cure = "pass --dropout 0, or another model" if settings.dropout else "pass another model"
        raise CommandError(
            f"--model: PEFT, which the demo trains beside, does not adapt it: {str(error).rstrip('.')}; {cure}"
        ) from error


def _compare_steps(
    model: nn.Module, peft_model: nn.Module, corpus: Corpus, settings: Settings, output: Output
) -> dict[str, Any]:
    """Seconds of forward + backward and saved bytes, this package and PEFT in turns on the same batch."""
    device = next(model.parameters()).device
    ids = corpus.batch(settings.windows, torch.Generator().manual_seed(settings.seed)).to(device)
    models = {OURS: model.train(), PEFT: peft_model.train()}
    with output.status("Timing a training step beside PEFT"):
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
    with output.status("A sample before training"):
        before = sample(model, tokenizer, prompt)
    losses, held_out = train(model, corpus, settings, output)
    with output.status("A sample after training"):
        after = sample(model, tokenizer, prompt)
    ranks = {"ranks": kept_ranks(model)} if settings.variant == "adalora" else {}
    return ranks | {
        "losses": losses,
        "held_out": held_out,
        "prompt": tokenizer.decode(prompt[0].tolist()),
        "sample": {"before": before, "after": after},
    }
