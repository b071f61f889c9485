"""The order of operations of Unsloth's LoRA_W, LoRA_QKV and LoRA_MLP in plain PyTorch, as a peer of the benchmark.

Same dtype throughout and no dropout: with dropout Unsloth leaves its fused path for PEFT's. Forward, y = x·Wᵀ and then
y += s·(x·Aᵀ)·Bᵀ in place; only inputs are saved. Backward computes x·Aᵀ and dy·B anew where it reads them (dy·B twice),
writes dy·W and adds the low-rank term in place; q, k and v, and gate and up, add into one dx. Unsloth's SwiGLU is a Triton
kernel; here it is PyTorch's operations, as in every other row of the same table.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Weights = tuple[Tensor, Tensor, Tensor]  # W[N,K], A[R,K], B[N,R]


def project(x: Tensor, weights: Weights, s: float) -> Tensor:
    """y = x·Wᵀ, then y += s·(x·Aᵀ)·Bᵀ in place."""
    W, A, B = weights
    y = x @ W.T
    return y.addmm_(x @ A.T, B.T, alpha=s)


def adapter_gradients(x: Tensor, dy: Tensor, weights: Weights, s: float) -> tuple[Tensor, Tensor]:
    """dA = s·(dy·B)ᵀ·x and dB = s·dyᵀ·(x·Aᵀ), each from x and dy."""
    _, A, B = weights
    dA_T = x.T @ (dy @ B)
    dB_T = (A @ x.T) @ dy
    return dA_T.mul_(s).T, dB_T.mul_(s).T


def input_gradient(dy: Tensor, weights: Weights, s: float, into: Tensor | None = None) -> Tensor:
    """dx = dy·W + s·(dy·B)·A, added to `into` where it is given."""
    W, A, B = weights
    dx = dy @ W if into is None else into.addmm_(dy, W)
    return dx.addmm_(dy @ B, A, alpha=s)


class LinearFunction(torch.autograd.Function):
    """One layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.s = s
        return project(x, (W, A, B), s)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dA, dB = adapter_gradients(x, dys[0], tuple(weights), ctx.s)
        return input_gradient(dys[0], tuple(weights), ctx.s), None, dA, dB, None


class QKVFunction(torch.autograd.Function):
    """Three layers that read one x: one dx, into which each adds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.s = s
        return tuple(project(x, layer, s) for layer in _layers(weights))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gradients, dx = [], None
        for dy, layer in zip(dys, _layers(weights), strict=True):
            gradients += [None, *adapter_gradients(x, dy, layer, ctx.s)]
            dx = input_gradient(dy, layer, ctx.s, into=dx)
        return dx, None, *gradients


class MLPFunction(torch.autograd.Function):
    """down(silu(e) · g) with e = gate(x), g = up(x): x, e and g are saved, their product is computed anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: float, *weights: Tensor) -> Tensor:
        gate, up, down = _layers(weights)
        e, g = project(x, gate, s), project(x, up, s)
        ctx.save_for_backward(x, e, g, *weights)
        ctx.s = s
        return project(F.silu(e).mul_(g), down, s)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, e, g, *weights = ctx.saved_tensors
        gate, up, down = _layers(weights)
        d = input_gradient(dys[0], down, ctx.s)
        silu = F.silu(e)
        of_down = adapter_gradients(silu * g, dys[0], down, ctx.s)
        de, dg = torch.ops.aten.silu_backward(d * g, e), d.mul_(silu)
        of_gate, of_up = adapter_gradients(x, de, gate, ctx.s), adapter_gradients(x, dg, up, ctx.s)
        dx = input_gradient(de, gate, ctx.s, into=input_gradient(dg, up, ctx.s))
        return dx, None, None, *of_gate, None, *of_up, None, *of_down


def _layers(weights: Any) -> list[Weights]:
    return [tuple(weights[first : first + 3]) for first in range(0, len(weights), 3)]  # type: ignore[misc]


class Linear(nn.Module):
    """Holds W (frozen), A and B; its call is LinearFunction's."""

    def __init__(self, W: Tensor, A: Tensor, B: Tensor, s: float):
        super().__init__()
        self.weight = nn.Parameter(W, requires_grad=False)
        self.A, self.B, self.s = nn.Parameter(A.clone()), nn.Parameter(B.clone()), s

    def weights(self) -> Weights:
        return self.weight, self.A, self.B

    def forward(self, x: Tensor) -> Tensor:
        return LinearFunction.apply(x, *self.weights(), self.s)
