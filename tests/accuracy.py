"""Cases of lora_linear for the one tolerance rule, which lora_kernels/commands/accuracy_gate.py states.

err(tested) <= 1.5 · err(PyTorch at that dtype) + tiny, for each output and gradient apart; err is ‖· − truth‖ / ‖truth‖, and
also the largest element error over the largest magnitude; truth is float64 on the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import dropout_mask, lora_linear
from lora_kernels.commands.accuracy_gate import errors, violations
from lora_kernels.mask import keep_scale

__all__ = ["Case", "check", "check_checkpoint", "check_compiled", "errors", "ours", "pytorch", "run", "truth", "violations"]
NAMES = ("x", "W", "A", "B", "c")
DRAWS, TINY_RESULT = 8, 32  # draws of a case that has a result, or h and g, of fewer elements


@dataclass
class Case:
    """One call of lora_linear with everything that it depends on. dtype is of x, W and c; adapter_dtype of A and B."""

    M: int | tuple[int, ...] = 17
    K: int = 24
    N: int = 33
    R: int = 4
    p: float = 0.0
    scaling: float | Tensor = 2.0
    bias: bool = True
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    needs: tuple[str, ...] = ("x", "A", "B", "c")
    seed: int = 20260
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strided: bool = False
    autocast: torch.dtype | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Freshly drawn inputs and the gradient dy, leaves where the case wants their gradient."""
        shape = (self.M,) if isinstance(self.M, int) else self.M
        wide, adapter = self.dtype, self.adapter_dtype or self.dtype
        values = {
            "x": self._draw(*shape, self.K).to(wide),
            "W": (self._draw(self.N, self.K) / self.K**0.5).to(wide),
            "A": (torch.randn(self.R, self.K) / self.K**0.5).to(adapter),
            "B": (torch.randn(self.N, self.R) / self.R**0.5).to(adapter),
            "c": torch.randn(self.N).to(wide),
            "dy": self._draw(*shape, self.N).to(self.autocast or wide),
        }
        if not self.bias:
            del values["c"]
        values = {name: value.to(self.device) for name, value in values.items()}
        for name in self.needs:
            if name in values:
                values[name].requires_grad_()
        return values

    def _draw(self, *shape: int) -> Tensor:
        """Normal values; if `strided`, a view whose rows lie apart and which does not start where its memory does."""
        if not self.strided:
            return torch.randn(*shape)
        return torch.randn(*shape[:-1], shape[-1] + 5)[..., 3:-2]

    def mask(self) -> Tensor:
        rows = torch.Size((self.M,) if isinstance(self.M, int) else self.M).numel()
        return dropout_mask(rows, self.K, self.p, self.seed)


Outputs = dict[str, Tensor]


def run(case: Case, tensors: dict[str, Tensor], compute: Callable[..., Tensor]) -> Outputs:
    """y and the wanted gradients of compute(x, W, A, B, c)."""
    leaves = [tensors[name] for name in NAMES if name in case.needs and name in tensors]
    with torch.autocast(case.device.type, case.autocast or torch.bfloat16, enabled=case.autocast is not None):
        y = compute(*(tensors.get(name) for name in NAMES))
    grads = torch.autograd.grad(y, leaves, tensors["dy"].to(y.dtype)) if leaves else ()
    names = [f"d{name}" for name in NAMES if name in case.needs and name in tensors]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def ours(case: Case, tensors: dict[str, Tensor]) -> Outputs:
    return run(case, tensors, lambda *args: lora_linear(*args, scaling=case.scaling, dropout_p=case.p, seed=case.seed))


def pytorch(case: Case, tensors: dict[str, Tensor]) -> Outputs:
    """Plain PyTorch operations at the case's dtypes, in the order that PEFT uses."""

    def compute(x: Tensor, W: Tensor, A: Tensor, B: Tensor, c: Tensor | None) -> Tensor:
        keep = case.mask().view(x.shape).to(x.device)
        dropped = (x * keep * keep_scale(case.p)).to(A.dtype)
        low_rank = F.linear(F.linear(dropped, A), B) * case.scaling
        y = F.linear(x, W, c)
        return (y + low_rank).to(y.dtype)

    return run(case, tensors, compute)


def truth(case: Case, tensors: dict[str, Tensor]) -> Outputs:
    exact = replace(case, autocast=None, device=torch.device("cpu"), scaling=float(case.scaling))
    wide = {name: t.detach().cpu().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    return pytorch(exact, wide)


def check(case: Case) -> None:
    """Assert the rule for lora_linear, that dtypes are PyTorch's, and that no input was written to.

    The error of a result of few elements is luck, above all where its terms cancel, and h and g, of M·R elements, are in every
    result: such a case is drawn several times and judged over all its draws.
    """
    judged = [_draw_and_run(case)]
    rows = case.M if isinstance(case.M, int) else math.prod(case.M)
    if any(0 < size < TINY_RESULT for size in (rows * case.R, *(t.numel() for t in judged[0][2].values()))):
        judged += [_draw_and_run(case) for _ in range(DRAWS - 1)]
    results = [{name: torch.cat([draw[name] for draw in draws]) for name in draws[0]} for draws in zip(*judged, strict=True)]
    broken = violations(*results, case.autocast or case.dtype)
    assert not broken, f"{case}: {broken}"


def check_checkpoint(tensors: dict[str, Any], use_reentrant: bool) -> None:
    """Assert that torch.utils.checkpoint changes no bit of the gradients, dropout's drawn mask included."""

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, *(tensors[name] for name in "WABc"), dropout_p=0.4)

    gradients = []
    for compute in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        for name in "xABc":
            tensors[name].grad = None
        compute(tensors["x"]).backward(tensors["dy"])
        gradients.append([tensors[name].grad.clone() for name in "xABc"])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def check_compiled(case: Case, draw: Callable[[Case], dict[str, Any]]) -> None:
    """Assert that forward and backward as one graph each give eager's results, with dropout, for several batch sizes."""
    torch._dynamo.reset()

    def compute(x: Tensor, W: Any, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        return lora_linear(x, W, A, B, c, scaling=0.5, dropout_p=0.3, seed=case.seed)

    compiled = torch.compile(compute, fullgraph=True)
    for M in (17, 5, (2, 3)):
        case.M = M
        tensors = draw(case)
        expected = ours(case, tensors)
        y = compiled(*(tensors[name] for name in "xWABc"))
        grads = torch.autograd.grad(y, [tensors[name] for name in "xABc"], tensors["dy"])
        for name, value in zip(("y", "dx", "dA", "dB", "dc"), (y, *grads), strict=True):
            assert value.dtype == expected[name].dtype
            torch.testing.assert_close(value, expected[name])


def _draw_and_run(case: Case) -> tuple[Outputs, Outputs, Outputs]:
    tensors = case.tensors()
    before = {name: t.detach().clone() for name, t in tensors.items()}
    tested, plain, exact = ours(case, tensors), pytorch(case, tensors), truth(case, tensors)
    assert {name: (t.dtype, t.shape) for name, t in tested.items()} == {name: (t.dtype, t.shape) for name, t in plain.items()}
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was written to"
    return tested, plain, exact
