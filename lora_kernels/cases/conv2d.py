"""A case of lora_conv2d: everything that a call depends on, its tensors, and what it must give.

x[n,C,H,W]  W[N,C,kh,kw]  A[R,C,kh,kw]  B[N,R,1,1]  c[N]  dy like y      p dropout      s scaling
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..functional.conv2d import lora_conv2d, window_of
from ..reference import conv2d as reference
from ..values import Dropout, LoRAWeights
from .rule import Results

Pair = int | tuple[int, int]


@dataclass
class Case:
    """One call of lora_conv2d. channels_last: the memory format of x, W and dy. needs: the letters with a gradient."""

    n: int = 2
    C: int = 8
    N: int = 10
    R: int = 3
    size: tuple[int, int] = (9, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: Pair = 1
    padding: Pair | str = 1
    dilation: Pair = 1
    p: float = 0.0
    position: str = "x"
    scaling: float | Tensor = 0.7
    bias: bool = True
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    autocast: torch.dtype | None = None
    channels_last: bool = False
    needs: tuple[str, ...] = ("x", "W", "A", "B", "c")
    seed: int = 20260
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def draw(self) -> "Problem":
        """Normal values, scaled so that results have a size near one."""
        adapter, (N, C, R), fan = self.adapter_dtype or self.dtype, (self.N, self.C, self.R), self.C * self.kernel[0]
        form = torch.channels_last if self.channels_last else torch.contiguous_format

        def normal(*shape: int, scale: float, dtype: torch.dtype = self.dtype) -> Tensor:
            t = torch.randn(shape).mul_(scale).to(self.device, dtype)
            return t.contiguous(memory_format=form) if len(shape) == 4 else t

        tensors = {
            "x": normal(self.n, C, *self.size, scale=1.0),
            "W": normal(N, C, *self.kernel, scale=fan**-0.5),
            "A": normal(R, C, *self.kernel, scale=fan**-0.5, dtype=adapter),
            "B": normal(N, R, 1, 1, scale=R**-0.5, dtype=adapter),
            "c": normal(N, scale=1.0) if self.bias else None,
        }
        for name in self.needs:
            if (t := tensors[name]) is not None:
                t.requires_grad_()
        out = reference.convolve(tensors["x"], tensors["W"], None, window_of(self.kernel, **self.options))  # type: ignore[arg-type]
        return Problem(self, tensors, normal(*out.shape, scale=1.0, dtype=self.autocast or self.dtype))


@dataclass(frozen=True)
class Problem:
    """A case with its tensors, by letter."""

    case: Case
    tensors: dict[str, Tensor | None]
    dy: Tensor

    def compute(self, layer: Callable[..., Tensor]) -> Results:
        """y and the wanted gradients, "dx", "dA" …, of layer(x, W, A, B, c)."""
        leaves = {name: t for name, t in self.tensors.items() if t is not None and t.requires_grad}
        autocast = self.case.autocast
        with torch.autocast(self.dy.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            y = layer(*self.tensors.values())
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype)) if leaves else ()
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def ours(problem: Problem) -> Results:
    """lora_conv2d's results."""
    case = problem.case
    options: dict[str, Any] = {
        "scaling": case.scaling,
        "dropout_p": case.p,
        "seed": case.seed,
        "dropout_position": case.position,
    }
    return problem.compute(lambda x, W, A, B, c: lora_conv2d(x, W, A, B, c, **options, **case.options))


def plain(problem: Problem) -> Results:
    """The reference's results at the case's own dtypes: PyTorch's operations in PEFT's order."""
    case = problem.case
    dropout = Dropout(case.p, torch.tensor(case.seed, device=problem.dy.device)) if case.p else None
    window = window_of(case.kernel, **case.options)

    def layer(x: Tensor, W: Tensor, A: Tensor, B: Tensor, c: Tensor | None) -> Tensor:
        return reference.forward(x, LoRAWeights(W, A, B, c, case.scaling), dropout, case.position, window)[0]

    return problem.compute(layer)


def truth(problem: Problem) -> Results:
    """The reference's results in float64."""
    case = Case(**{**vars(problem.case), "dtype": torch.float64, "autocast": None, "scaling": float(problem.case.scaling)})
    wide = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for name, t in problem.tensors.items()
    }
    return plain(Problem(case, wide, problem.dy.double()))
