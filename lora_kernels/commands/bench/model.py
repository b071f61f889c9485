"""`lora-kernels bench --model DIR`: one training step of a whole model, LoRA on all its linear layers.

Rows: the frozen model without adapters (the floor), this package, PEFT eager, over the same frozen tensors, in turns. Each
different layer of the model must pass the correctness gate, and every loss must be finite, before anything is timed.
"""

import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...cases.linear import Case
from ...cases.linear import wrong as wrong_results
from ...dtypes import dtype_name
from ...models.config import LoRAConfig
from .. import model_step, pretrained
from ..console import Output
from ..layer_shapes import group_layers
from ..measure import held_bytes, kernel_launches, peak_bytes, saved_bytes
from ..timing import interleaved
from . import peers
from .header import Refusals, new_header, print_refusals
from .model_rows import print_rows, times
from .model_settings import Settings
from .peers import BARE

GATE_TOKENS = 256
OTHERS = "not measured for a whole model; --quantize nf4 has bitsandbytes under PEFT"
CAPTION = (
    "One forward + backward without the optimizer. Adapters: float32 over a 16-bit base. bare: no adapters, the gradient runs "
    "to the embeddings. x PEFT: how many times faster than PEFT. saved: kept by autograd for the backward pass beyond the "
    "parameters. held: all that stays allocated after the forward pass, logits included. peak: allocated at once in the step."
)


def run(
    settings: Settings, device: torch.device, repeats: int, output: Output, compare: tuple[str, ...] = ("peft",), seed: int = 0
) -> dict[str, Any]:
    """Measure every combination, print a table of each, return header, rows, failures and refusals."""
    settings.check()
    header = new_header(device, repeats, seed, output)
    measured = ("peft", "bnb") if settings.quantize else ("peft",)
    refusals: Refusals = [
        {"peer": peer, "case": "all", "reason": reason}
        for peer in compare
        if (reason := OTHERS if peer not in measured else peers.why_not(peer, quantize=settings.quantize))
    ]
    print_refusals(refusals, output)
    with_peft = any(peer in measured and peer not in {refusal["peer"] for refusal in refusals} for peer in compare)
    model = pretrained.load_model(settings.model, settings.dtype, device)
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    result = {"header": header, "rows": rows, "failures": failures, "peers_not_measured": refusals}
    for tokens, rank, p in itertools.product(settings.tokens, settings.ranks, settings.dropouts):
        config = LoRAConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p, target_modules="all-linear")
        one = replace(settings, tokens=(tokens,), length=min(tokens, settings.length))
        case = f"{settings.model.name}, {tokens} tokens, r={rank}, p={p}, {dtype_name(settings.dtype)}"
        peer = _peer(model, config, settings.quantize) if with_peft else None
        if isinstance(peer, str):
            refused = [{"peer": name, "case": case, "reason": peer} for name in compare if name in measured]
            print_refusals(refused, output)
            refusals += refused
            peer = None
        with output.status(f"Timing a step of {case}"):
            new, wrong = measure(model, config, one, device, repeats, peer, seed)
        failures += [{"case": case, "reason": reason} for reason in wrong]
        rows += new
        if wrong:
            output.print(f"{case}: no times reported, the correctness gate failed", *wrong, sep="\n  ", markup=False)
        else:
            print_rows(case, new, output)
        output.save_progress(result)
    output.print(CAPTION)
    return result


def measure(
    model: nn.Module,
    config: LoRAConfig,
    settings: Settings,
    device: torch.device,
    repeats: int,
    peer: nn.Module | None,
    seed: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what is wrong): no rows where anything is wrong. peer: the model under PEFT, if it is measured."""
    ids = model_step.random_ids(model, settings.tokens[0], settings.length, seed)
    mine, theirs = settings.names
    models = {BARE: model_step.frozen_twin(model), mine: model_step.ours(model, config, settings.quantize)}
    if peer is not None:
        models[theirs] = peer
    for candidate in models.values():
        candidate.train()
    wrong = _wrong(models, config, ids, settings, device, seed)
    if wrong:
        return [], wrong
    steps = {name: model_step.step(candidate, ids) for name, candidate in models.items()}
    timings = interleaved(steps, repeats, warmup=1, device=device)
    about = {
        "model": settings.model.name,
        **{"tokens": ids.numel(), "sequence_length": ids.shape[1], "R": config.r, "p": config.lora_dropout},
        "dtype": dtype_name(settings.dtype),
    }
    rows = []
    for name, candidate in models.items():
        candidate.zero_grad(set_to_none=True)
        forward = functools.partial(model_step.loss, candidate, ids)
        rows.append(
            {
                **about,
                **times(name, timings, ids.numel(), None if peer is None else theirs),
                "saved_bytes": saved_bytes(forward, exclude=[ids, *candidate.buffers()]),
                "held_bytes": held_bytes(forward, device),
                "peak_bytes": peak_bytes(steps[name], device),
                "launches": kernel_launches(steps[name], device),
            }
        )
        candidate.zero_grad(set_to_none=True)
    return rows, []


def _peer(model: nn.Module, config: LoRAConfig, quantize: str | None) -> nn.Module | str:
    """The model under PEFT, or PEFT's reason for not adapting it, such as experts in one parameter with dropout."""
    try:
        return model_step.peft_twin(model, config, quantize)
    except ValueError as error:
        return f"PEFT does not adapt this model: {' '.join(str(error).split())}"


def _wrong(
    models: dict[str, nn.Module], config: LoRAConfig, ids: torch.Tensor, settings: Settings, device: torch.device, seed: int
) -> list[str]:
    """The gate's reasons for each different layer, with its own dtypes, and losses that are not finite."""
    name, _ = settings.names
    groups = group_layers(models[name])
    adapter = next(parameter.dtype for parameter in models[name].parameters() if parameter.requires_grad)
    reasons = []
    for group in groups:
        case = Case(
            min(GATE_TOKENS, ids.numel()), group.K, group.N, group.R, config.lora_dropout, dtype=settings.dtype, seed=seed,
            adapter_dtype=adapter, bias=False, device=device, quant_type=settings.quantize,
        )  # fmt: skip
        problem = case.draw(torch.Generator(device).manual_seed(seed))
        reasons += [f"{name} {group.K}→{group.N}: {reason}" for reason in wrong_results(problem)]
    with torch.no_grad():
        for name, model in models.items():
            value = model_step.loss(model, ids).item()
            if not abs(value) < float("inf"):
                reasons.append(f"{name}: the loss is {value}")
    return reasons
