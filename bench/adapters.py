"""One batch of many adapters on this machine: accelerate's one call beside PEFT's loop over adapter_names.

    PYTHONPATH=. python bench/adapters.py [--repeats N] [--json FILE]

A layer in evaluation, as PEFT's adapter_names is for that alone, over a batch whose samples have 1, 4, 16 or 64 adapters in
turn; beside it the accelerated layer with one active adapter for all. Medians of interleaved runs. Fails if outputs differ.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from row_writing import main
from torch import nn

from lora_kernels import accelerate
from lora_kernels.commands.timing import interleaved

RANK, ADAPTERS = 8, (1, 4, 16, 64)
SIZES = ((64, 1, 576, 1536), (64, 1, 2048, 2048), (64, 16, 2048, 2048))  # samples, tokens of each, K, N


def model_of(K: int, N: int, adapters: int) -> nn.Module:
    """A PeftModel of one layer, with adapters a0, a1, …"""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(K, N)), config, "a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model.eval()


@torch.no_grad()
def measured(samples: int, tokens: int, K: int, N: int, adapters: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of PEFT's loop, of one call, and of one adapter for all, after the first two have agreed."""
    theirs = model_of(K, N, adapters)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x, names = torch.randn(samples, tokens, K), [f"a{i % adapters}" for i in range(samples)]
    ways = {
        "peft": lambda: theirs(x, adapter_names=names),
        "accelerated": lambda: ours(x, adapter_names=names),
        "one adapter": lambda: ours(x),
    }
    torch.testing.assert_close(ways["accelerated"](), ways["peft"](), rtol=1e-4, atol=1e-4)
    found = interleaved(ways, repeats=repeats)
    ms = {way: {part: 1e3 * value for part, value in vars(t).items() if part != "repeats"} for way, t in found.items()}
    about = {"adapters": adapters, "samples": samples, "tokens": tokens, "K": K, "N": N, "ms": ms}
    return about | {"ratio": found["peft"].median / found["accelerated"].median}


def rows(repeats: int) -> Iterator[dict[str, Any]]:
    for size in SIZES:
        for adapters in ADAPTERS:
            yield measured(*size, adapters, repeats)


def shown(row: dict[str, Any]) -> str:
    times = ", ".join(f"{way} {ms['median']:.2f} ms" for way, ms in row["ms"].items())
    about = f"{row['samples']}x{row['tokens']} rows, {row['K']}->{row['N']}, {row['adapters']} adapters"
    return f"{about}: {times}: {row['ratio']:.2f}x"


if __name__ == "__main__":
    main(__doc__, 20, rows, shown)
