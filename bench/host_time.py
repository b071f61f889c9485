"""Where the host's time of a small call goes on PyTorch's backend, in µs on one core of a CPU, beside PEFT's.

    PYTHONPATH=. OMP_NUM_THREADS=1 python bench/host_time.py [windows]

Rows are what a user waits for, at x[8, 32] and rank 4; parts, what they are made of, each alone. Each number is the least of
many short windows, variants in turn, so that a busy machine shows in none. bench/host_time_triton.py is the same for Triton's
path.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import LoRALinear, accelerate, lora_linear
from lora_kernels.commands.timing import least
from lora_kernels.functional.linear import LINEAR
from lora_kernels.mask import draw_seed, drop
from lora_kernels.operation.prepared import prepare
from lora_kernels.values import Dropout, LoRAWeights

M, K, N, R = 8, 32, 32, 4


class Nothing(torch.autograd.Function):
    """A Function of as many tensors that computes nothing: the floor of any layer with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B)
        return torch.empty(M, N)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def layers(p: float) -> dict[str, nn.Module]:
    """The layers of the rows, in training mode."""
    made: dict[str, nn.Module] = {"LoRALinear": LoRALinear.from_linear(nn.Linear(K, N), r=R, lora_dropout=p)}
    made["LoRALinear, NF4"] = LoRALinear.from_linear(nn.Linear(2 * K, N), r=R, lora_dropout=p, quantize="nf4")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return made
    for name in ("PEFT eager", "PEFT accelerated"):
        model = get_peft_model(nn.Sequential(nn.Linear(K, N)), LoraConfig(r=R, lora_dropout=p, target_modules=["0"]))
        if name == "PEFT accelerated":
            accelerate(model)
        made[name] = model.base_model.model[0]
    return made


def rows(p: float) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """name -> (forward, forward and backward to x, A and B)."""
    found: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    x, A, B = (torch.randn(size, requires_grad=True) for size in ((M, K), (R, K), (N, R)))
    dy = torch.randn(M, N)
    found["a Function that does nothing"] = _both(functools.partial(Nothing.apply, x, A, B), [x, A, B], dy)
    for name, layer in layers(p).items():
        x = torch.randn(M, 2 * K if "NF4" in name else K, requires_grad=True)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        found[name] = _both(functools.partial(layer, x), [x, *trained], dy)
    return found


def _both(call: Callable[[], Tensor], leaves: list[Tensor], dy: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    return call, lambda: torch.autograd.grad(call(), leaves, dy)


def parts(p: float) -> dict[str, Callable[[], Any]]:
    """What a call of LoRALinear is made of, from the outside to the inside, and what it consists of there."""
    layer = layers(p)["LoRALinear"]
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    A, B, W, c = layer.lora_A["default"], layer.lora_B["default"], layer.weight, layer.bias  # type: ignore[index]
    members = (LoRAWeights(W, A, B, c, 2.0),)
    asked, dropout = (Dropout(p, None), Dropout(p, draw_seed(x.device))) if p else (None, None)  # type: ignore[arg-type]
    prepared = prepare(LINEAR, x, members, asked, ())
    with torch.no_grad():
        results, saved = prepared.plan.forward(x, members, dropout)
    found: dict[str, Callable[[], Any]] = {
        "layer(x)": lambda: layer(x),
        "  lora_linear(x, …)": lambda: lora_linear(x, W, A, B, c, scaling=2.0, dropout_p=p),
        "    checks, dtypes, gradients, choice: a look-up": lambda: prepare(LINEAR, x, members, asked, ()),
        "    a Function that does nothing": lambda: Nothing.apply(x, A, B),
        "    the backend's forward": lambda: prepared.plan.forward(x, members, dropout),
        "    what is saved": lambda: prepared.saved(x, members, saved, dropout, ()),
        "backward: the backend's": lambda: prepared.plan.backward((dy,), x, members, saved, dropout, prepared.needs),
        "torch.empty, of which there are two forward, three backward": lambda: torch.empty(
            (M, N), dtype=x.dtype, device=x.device
        ),
        "a product of PyTorch's": lambda: torch.mm(dy, W.detach()),
    }
    if dropout is not None:
        found["a seed"] = lambda: draw_seed(x.device)
        found["drop(x), where it is a call of its own"] = lambda: drop(dy, p, dropout.seed)
    del results
    return found


def main(windows: int) -> None:
    torch.set_num_threads(1)
    for p in (0.0, 0.1):
        times = rows(p)
        forward = least({name: pair[0] for name, pair in times.items()}, windows=windows)
        both = least({name: pair[1] for name, pair in times.items()}, windows=windows)
        peft = forward.get("PEFT eager"), both.get("PEFT eager")
        print(f"{f'p = {p}':64}{'forward':>9}{'× PEFT':>8}{'both':>9}{'× PEFT':>8}")
        for name in times:
            ratios = [
                f"{own[name] / theirs:8.2f}" if theirs else f"{'':8}" for own, theirs in zip((forward, both), peft, strict=True)
            ]
            print(f"{name:64}{1e6 * forward[name]:9.1f}{ratios[0]}{1e6 * both[name]:9.1f}{ratios[1]}", flush=True)
        print()
        for name, seconds in least(parts(p), windows=windows).items():
            print(f"{name:64}{1e6 * seconds:9.1f}", flush=True)
        print()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
