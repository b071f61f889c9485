"""A step of a small UNet of diffusers with LoRA in its convolutions and attention, beside PEFT's: time and saved bytes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python bench/unet.py [--repeats N] [--channels-last] [--json FILE]

The step is a forward and a backward pass of the squared error against noise, in float32, without the optimizer. PEFT's model,
the same accelerated, and add_lora's share all frozen tensors, and have to agree at p = 0 before they are timed: medians of
interleaved steps. Saved bytes are what autograd keeps for the backward pass, without parameters.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from row_writing import write_rows
from torch import Tensor, nn

from lora_kernels import LoRAConfig, accelerate, add_lora
from lora_kernels.commands.measure import saved_bytes
from lora_kernels.commands.model_step import shared_copy
from lora_kernels.commands.timing import interleaved

TARGETS = ["conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0"]
PEFT, ACCELERATED, OURS = "peft", "peft, accelerated", "lora_kernels"


def unet(channels: tuple[int, int] = (64, 128), size: int = 32) -> nn.Module:
    """Two levels, the second with attention; random weights, the same at each call."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def ways(base: nn.Module, p: float, r: int) -> dict[str, nn.Module]:
    """The model in each way, over the same frozen tensors and with the same adapters."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": r, "lora_alpha": 2 * r, "lora_dropout": p, "target_modules": TARGETS}
    own = shared_copy(base)
    add_lora(own, LoRAConfig(**settings))
    theirs = get_peft_model(shared_copy(base), LoraConfig(**settings))  # type: ignore[arg-type]
    fast = get_peft_model(shared_copy(base), LoraConfig(**settings))  # type: ignore[arg-type]
    accelerate(fast)
    found = {PEFT: theirs, ACCELERATED: fast, OURS: own}
    for model in found.values():
        adapters = {name.removeprefix("base_model.model."): t for name, t in model.named_parameters() if "lora_" in name}
        torch.manual_seed(1)
        with torch.no_grad():
            for _, tensor in sorted((name.removesuffix(".weight"), t) for name, t in adapters.items()):
                tensor.normal_(std=0.05)
    return found


def loss(model: nn.Module, x: Tensor, steps: Tensor, text: Tensor, noise: Tensor) -> Tensor:
    """The squared error of the predicted noise."""
    return (model(x, steps, text).sample - noise).square().mean()


def step(model: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """A forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    loss(model, *batch).backward()


def rows(channels: tuple[int, int], size: int, samples: int, r: int, repeats: int, channels_last: bool) -> list[dict[str, Any]]:
    """A row for each p; AssertionError where the losses at p = 0 differ."""
    base = unet(channels, size)
    batch = (torch.randn(samples, 3, size, size), torch.randint(1000, (samples,)), torch.randn(samples, 8, 32))
    batch = (*batch, torch.randn(samples, 3, size, size))
    if channels_last:
        base = base.to(memory_format=torch.channels_last)
        batch = (batch[0].contiguous(memory_format=torch.channels_last), *batch[1:])
    found = []
    for p in (0.0, 0.1):
        models = ways(base, p, r)
        if not p:
            losses = [loss(model, *batch).item() for model in models.values()]
            assert max(losses) - min(losses) < 1e-5 * losses[0], losses
        steps: dict[str, Callable[[], Any]] = {name: functools.partial(step, model, batch) for name, model in models.items()}
        times = interleaved(steps, repeats=repeats, warmup=2)
        saved = {name: saved_bytes(functools.partial(loss, model, *batch), exclude=batch) for name, model in models.items()}
        found.append(
            {
                "p": p,
                "R": r,
                "channels": channels,
                "size": size,
                "samples": samples,
                "channels_last": channels_last,
                "ms": {name: {part: 1e3 * v for part, v in vars(t).items() if part != "repeats"} for name, t in times.items()},
                "saved_bytes": saved,
            }
        )
    return found


def shown(row: dict[str, Any]) -> str:
    lines = []
    for name, times in row["ms"].items():
        mib, share = row["saved_bytes"][name] / 2**20, row["saved_bytes"][name] / row["saved_bytes"][PEFT]
        ratio = row["ms"][PEFT]["median"] / times["median"]
        about = f"{times['median']:8.1f} ms, least fifth {times['p20']:8.1f}, PEFT's / {ratio:.2f}"
        lines.append(f"p={row['p']} {name:18} {about}; saved {mib:6.1f} MiB, {share:.2f} of PEFT's")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--channels", type=int, nargs=2, default=(64, 128))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    channels = (options.channels[0], options.channels[1])
    found = rows(channels, options.size, options.samples, options.rank, options.repeats, options.channels_last)
    write_rows(found, options.json, shown)


if __name__ == "__main__":
    main(sys.argv[1:])
