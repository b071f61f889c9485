"""`lora-kernels bench --model DIR`: one training step of a whole model, LoRA on all its linear layers.

Rows: the frozen model without adapters (the floor), this package with each layer alone and with fused blocks, PEFT eager, and
PEFT accelerated, over the same frozen tensors, in turns. Each different layer and block of the model must pass the correctness
gate, and every loss must be finite, before anything is timed (model_gate.py).
"""

import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...dtypes import dtype_name
from ...integrations.peft import accelerate
from ...models.blocks import BlockReport, fuse_blocks
from ...models.config import LoRAConfig
from .. import model_step, pretrained
from ..console import Output
from ..measure import held_bytes, kernel_launches, peak_bytes, saved_bytes
from ..timing import interleaved
from . import peers
from .header import Refusals, new_header, print_refusals
from .model_gate import why_wrong
from .model_rows import print_rows, saved_over, times
from .model_settings import Settings
from .peers import BARE

OTHERS = "not measured for a whole model; --quantize nf4 has bitsandbytes under PEFT"
CAPTION = (
    "One forward + backward without the optimizer. Adapters: float32 over a 16-bit base. bare: no adapters, the gradient runs "
    "to the embeddings. x PEFT: how many times faster than PEFT. saved: kept by autograd for the backward pass beyond the "
    "parameters; of bare's, of PEFT's: over what that row saves. held: all that stays allocated after the forward pass, logits "
    "included. peak: allocated at once in the step. PEFT accelerated: by accelerate(), which fuses blocks."
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
        about: dict[str, Any] = {"target_modules": "all-linear", "use_dora": settings.dora}
        config = LoRAConfig(r=rank, lora_alpha=2 * rank, lora_dropout=p, **about)
        one = replace(settings, tokens=(tokens,), length=min(tokens, settings.length))
        case = f"{settings.model.name}, {tokens} tokens, r={rank}, p={p}, {dtype_name(settings.dtype)}{' DoRA' * settings.dora}"
        others = _peers(model, config, settings) if with_peft else {}
        if isinstance(others, str):
            refused = [{"peer": name, "case": case, "reason": others} for name in compare if name in measured]
            print_refusals(refused, output)
            refusals += refused
            others = {}
        with output.status(f"Timing a step of {case}"):
            new, wrong = measure(model, config, one, device, repeats, others, seed)
        failures += [{"case": case, "reason": reason} for reason in wrong]
        rows += [{"case": case, **row} for row in new]
        if wrong:
            output.print(f"{case}: no times reported, the correctness gate failed", *wrong, sep="\n  ", markup=False)
        else:
            print_rows(case, new, output)
            output.print(
                "\n".join(row["blocks"]["report"] for row in new if row["variant"] == settings.names.fused), markup=False
            )
        output.save_progress(result)
    output.print(CAPTION)
    return result


def measure(
    model: nn.Module,
    config: LoRAConfig,
    settings: Settings,
    device: torch.device,
    repeats: int,
    others: dict[str, nn.Module],
    seed: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, what is wrong): no rows where anything is wrong. others: what `_peers` made."""
    ids = model_step.random_ids(model, settings.tokens[0], settings.length, seed)
    ours, fused = (model_step.ours(model, config, settings.quantize) for _ in range(2))
    models = {BARE: model_step.frozen_twin(model), settings.names.ours: ours, settings.names.fused: fused, **others}
    for candidate in models.values():
        candidate.train()
    report = fuse_blocks(fused)
    wrong = why_wrong(models, config.lora_dropout, ids, settings, device, seed)
    if wrong:
        return [], wrong
    steps = {name: model_step.step(candidate, ids) for name, candidate in models.items()}
    timings = interleaved(steps, repeats, warmup=1, device=device)
    about = {
        "model": settings.model.name,
        **{"tokens": ids.numel(), "sequence_length": ids.shape[1], "R": config.r, "p": config.lora_dropout},
        "dtype": dtype_name(settings.dtype),
        "dora": settings.dora,
    }
    rows = []
    for name, candidate in models.items():
        candidate.zero_grad(set_to_none=True)
        forward = functools.partial(model_step.loss, candidate, ids)
        rows.append(
            {
                **about,
                **times(name, timings, ids.numel(), next(iter(others), None)),
                "saved_bytes": saved_bytes(forward, exclude=[ids, *candidate.buffers()]),
                "held_bytes": held_bytes(forward, device),
                "peak_bytes": peak_bytes(steps[name], device),
                "launches": kernel_launches(steps[name], device),
                "blocks": _blocks(report) if candidate is fused else None,
            }
        )
        candidate.zero_grad(set_to_none=True)
    for row in rows:
        row["saved_over"] = saved_over(row, rows, [BARE, *list(others)[:1]])
    return rows, []


def _blocks(report: BlockReport) -> dict[str, Any]:
    """What is fused, what not, and what the calls so far did."""
    return {"report": str(report), "groups": len(report.groups), "mlps": len(report.mlps), "calls": report.calls()}


def _peers(model: nn.Module, config: LoRAConfig, settings: Settings) -> dict[str, nn.Module] | str:
    """The model under PEFT, and accelerated, by name; or PEFT's reason for not adapting it, such as experts in one parameter
    with dropout.
    """
    try:
        peer, accelerated = (model_step.peft_twin(model, config, settings.quantize) for _ in range(2))
    except ValueError as error:
        return f"PEFT does not adapt this model: {' '.join(str(error).split())}"
    accelerate(accelerated)
    return {settings.names.peer: peer, settings.names.accelerated: accelerated}
