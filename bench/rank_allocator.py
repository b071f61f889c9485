"""A step of RankAllocator beside PEFT's update_and_allocate over 200 AdaLoRA layers, each a decision on ranks.

    PYTHONPATH=. OMP_NUM_THREADS=1 python bench/rank_allocator.py [--layers N] [--features N ...] [--json FILE]

Both get the same adapters and gradients, and have to keep the same ranks, before they are timed: medians of interleaved steps.
"""

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels import AdaLoRAConfig, RankAllocator, add_lora
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.commands.timing import interleaved

SETTINGS: dict[str, Any] = {"init_r": 12, "target_r": 8, "total_step": 10**6, "target_modules": r"\d+"}
STEP = 5 * 10**5  # of the million: three quarters of the way down


def models(layers: int, features: int) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and ours, with the same adapters and gradients."""
    from peft import AdaLoraConfig, get_peft_model

    base = nn.Sequential(*(nn.Linear(features, features, bias=False) for _ in range(layers)))
    ours = copy.deepcopy(base)
    theirs = get_peft_model(base, AdaLoraConfig(**SETTINGS))
    add_lora(ours, AdaLoRAConfig(**SETTINGS))
    named = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            own = named[name.removeprefix("base_model.model.")]
            with torch.no_grad():
                own.copy_(parameter.normal_())
            own.grad = (parameter.grad if parameter.grad is not None else torch.randn_like(parameter)).clone()
            parameter.grad = own.grad.clone()
    return theirs, ours


def row(layers: int, features: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step, and the ratio; AssertionError where the ranks differ."""
    theirs, ours = models(layers, features)
    allocator: Any = RankAllocator(ours)
    theirs.base_model.update_and_allocate(STEP)  # type: ignore[union-attr, operator]
    allocator.step(STEP)
    pattern = theirs.peft_config["default"].rank_pattern  # type: ignore[union-attr, index]
    assert {key.removesuffix(".lora_E.default"): sum(keep) for key, keep in pattern.items()} == allocator.ranks()
    steps = {
        "peft": lambda: theirs.base_model.update_and_allocate(STEP),  # type: ignore[union-attr, operator]
        "ours": lambda: allocator.step(STEP),
    }
    found = interleaved(steps, repeats=repeats)
    times = {
        name: {part: 1e3 * value for part, value in vars(timing).items() if part != "repeats"} for name, timing in found.items()
    }
    return {"layers": layers, "features": features, "ms": times, "ratio": found["peft"].median / found["ours"].median}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 576, 2048])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = []
    for features in options.features:
        rows.append(row(options.layers, features, options.repeats))
        ms = {name: f"{t['median']:.1f} ms ({t['p20']:.1f} to {t['p80']:.1f})" for name, t in rows[-1]["ms"].items()}
        print(
            f"{options.layers} × {features}→{features}: PEFT {ms['peft']}, ours {ms['ours']}: {rows[-1]['ratio']:.1f}×",
            flush=True,
        )
        if options.json:
            write_whole(options.json, json.dumps({"environment": environment(), "rows": rows}, indent=1), "--json")


if __name__ == "__main__":
    main(sys.argv[1:])
