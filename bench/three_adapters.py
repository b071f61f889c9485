"""Three adapters on three tasks in one batch over one frozen base, and each alone: the same losses from the same seeds.

    PYTHONPATH=. python bench/three_adapters.py [--steps N] [--json FILE]

The base is a small Llama with random weights; the tasks are to repeat, to reverse and to count on from a sequence of tokens.
Fails if a loss of the three together is more than 0.1 % off that of one alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import LoRAConfig, add_lora, lora_parameters, mixed_adapters
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment

TOKENS, HALF, SAMPLES, TOLERANCE = 32, 8, 8, 1e-3
RANKS = {"repeat": 4, "reverse": 8, "count": 16}
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda half: half,
    "reverse": lambda half: half.flip(1),
    "count": lambda half: (half[:, -1:] + 1 + torch.arange(HALF)) % TOKENS,
}


def model() -> nn.Module:
    """The base with the three adapters, the same at each call."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    found = LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, **size))
    for name, r in RANKS.items():
        add_lora(found, LoRAConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"), name)
    return found


def batches(name: str, steps: int) -> list[Tensor]:
    """A task's sequences for each step: a random half, and what it is to become."""
    generator = torch.Generator().manual_seed(list(TASKS).index(name))
    halves = torch.randint(TOKENS, (steps, SAMPLES, HALF), generator=generator)
    return [torch.cat([half, TASKS[name](half)], 1) for half in halves]


def train(names: list[str], steps: int) -> tuple[dict[str, list[float]], float]:
    """(the losses of each named task, seconds) of adapters that are trained in one batch."""
    trained, losses = model(), {name: [] for name in names}  # type: ignore[var-annotated]
    data, start = {name: batches(name, steps) for name in names}, time.perf_counter()
    with mixed_adapters(trained, [name for name in names for _ in range(SAMPLES)]):
        optimizer = torch.optim.AdamW(lora_parameters(trained), lr=5e-3)
        for step in range(steps):
            ids = torch.cat([data[name][step] for name in names])
            logits = trained(input_ids=ids).logits[:, HALF - 1 : -1]
            of_token = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, HALF:].flatten(), reduction="none")
            of_task = of_token.view(len(names), -1).mean(1)
            optimizer.zero_grad()
            of_task.sum().backward()
            optimizer.step()
            for name, loss in zip(names, of_task.tolist(), strict=True):
                losses[name].append(loss)
    return losses, time.perf_counter() - start


def main(arguments: list[str]) -> int:
    """Train together and alone; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write every loss and the environment there")
    options = parser.parse_args(arguments)
    together, seconds = train(list(TASKS), options.steps)
    rows: list[dict[str, Any]] = []
    for name in TASKS:
        alone, own = train([name], options.steps)
        off = max(abs(a - b) / b for a, b in zip(together[name], alone[name], strict=True))
        rows.append(
            {"task": name, "r": RANKS[name], "together": together[name], "alone": alone[name], "off": off, "seconds": own}
        )
        first, last = together[name][0], together[name][-1]
        print(
            f"{name:8} r={RANKS[name]:2}  loss {first:.4f} to {last:.4f}, alone {alone[name][-1]:.4f}; at most {off:.1e} apart"
        )
    apart = sum(row["seconds"] for row in rows)
    print(f"{options.steps} steps of the three together {seconds:.1f} s, one after the other {apart:.1f} s")
    if options.json:
        found = {"environment": environment(), "seconds": seconds, "rows": rows}
        write_whole(options.json, json.dumps(found, indent=1), "--json")
    return 1 if any(row["off"] > TOLERANCE for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
