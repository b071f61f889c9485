"""Fine-tune a small UNet of diffusers, from its configuration, on pictures drawn here, and show samples before and after.

    PYTHONPATH=. python bench/unet_training.py [--out DIR] [--base-steps N] [--steps N]

The base learns red discs on black, all of it; then LoRA in its convolutions and attention learns blue squares on white, by the
squared error of the predicted noise. Writes DIR/samples.png, the base's samples above and the adapter's below, from the same
noise, and DIR/adapter, which diffusers' load_lora_adapter reads: fails if the samples there are others.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from unet import TARGETS, unet

from lora_kernels import LoRAConfig, add_lora, lora_parameters, save_adapter

SIZE, BATCH, SHOWN = 16, 8, 8


def pictures(count: int, kind: str) -> Tensor:
    """x[count, 3, SIZE, SIZE] in [-1, 1]: red discs on black, or blue squares on white, of any place and size."""
    line = torch.arange(SIZE) - 0.5 * (SIZE - 1)
    reach = SIZE / 2 - torch.rand(count, 1, 1) * 2 - 2
    across, down = (line.view(shape) - (torch.rand(count, 1, 1) - 0.5) * 4 for shape in ((1, 1, -1), (1, -1, 1)))
    disc = kind == "disc"
    inside = across**2 + down**2 < reach**2 if disc else torch.maximum(across.abs(), down.abs()) < reach * 0.8
    shape, ground = torch.tensor([[1.0, -1, -1], [-1, -1, 1]])[0 if disc else 1], -1.0 if disc else 1.0
    return torch.where(inside[:, None], shape.view(1, 3, 1, 1), torch.tensor(ground))


def predict(model: nn.Module, x: Tensor, steps: Tensor) -> Tensor:
    """The noise in x; there is no text."""
    return model(x, steps, x.new_zeros(len(x), 1, 32)).sample


def train(model: nn.Module, parameters: list[nn.Parameter], scheduler: Any, kind: str, steps: int, lr: float) -> list[float]:
    """The losses of each step."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0), []
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, noise, at = pictures(BATCH, kind), torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))
        loss = (predict(model, scheduler.add_noise(x, noise, at), at) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def samples(model: nn.Module, scheduler: Any, steps: int) -> Tensor:
    """SHOWN pictures, from the same noise at each call."""
    x = torch.randn(SHOWN, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    scheduler.set_timesteps(steps)
    for at in scheduler.timesteps:
        x = scheduler.step(predict(model.eval(), x, at), at, x).prev_sample
    return x.clamp(-1, 1)


def write_png(path: Path, rows: list[Tensor]) -> None:
    """The pictures of each row side by side, eight times as large."""
    from PIL import Image

    grid = torch.cat([torch.cat(list(row), -1) for row in rows], -2).add(1).mul(127.5).round().byte()
    grid = grid.repeat_interleave(8, 1).repeat_interleave(8, 2)
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(path)


def timed(what: str, steps: int, run: Callable[[], list[float]]) -> None:
    start, losses = time.perf_counter(), run()
    last = losses[-max(1, steps // 10) :]
    seconds = time.perf_counter() - start
    print(f"{what:8} {steps} steps in {seconds:.0f} s, loss {losses[0]:.3f} to {sum(last) / len(last):.3f}", flush=True)


def main(arguments: list[str]) -> int:
    """Train both, show, save and load; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/unet"))
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sampling", type=int, default=40, help="steps of a sample")
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args(arguments)
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    model, reader = unet((24, 48), SIZE), unet((24, 48), SIZE)
    timed("base", options.base_steps, lambda: train(model, [*model.parameters()], scheduler, "disc", options.base_steps, 2e-3))
    reader.load_state_dict(model.state_dict())
    before = samples(model, scheduler, options.sampling)
    config = LoRAConfig(r=options.rank, lora_alpha=options.rank, lora_dropout=0.05, target_modules=TARGETS)
    print(add_lora(model.train(), config))
    timed("adapter", options.steps, lambda: train(model, lora_parameters(model), scheduler, "square", options.steps, 5e-3))
    after = samples(model, scheduler, options.sampling)
    options.out.mkdir(parents=True, exist_ok=True)
    write_png(options.out / "samples.png", [before, after])
    save_adapter(model, options.out / "adapter")
    reader.load_lora_adapter(options.out / "adapter", weight_name="adapter_model.safetensors", prefix="base_model.model")
    off = (samples(reader, scheduler, options.sampling) - after).abs().max().item()
    print(f"{options.out}/samples.png: before above, after below; diffusers' samples are at most {off:.1e} off")
    return 0 if off < 1e-3 else 1


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(sys.argv[1:]))
