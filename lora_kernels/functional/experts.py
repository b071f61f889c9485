"""What lies around the products of experts: tokens to rows by expert and back, and the activation between."""

from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..backends.torch import activation as pytorch
from ..segments import Segments


def rows_by_expert(x: Tensor, segments: Segments, top_k: int) -> Tensor:
    """x[tokens, K] -> [tokens·top_k, K]: a row for each choice of each token, sorted by expert."""
    return _Copies.apply(x, segments.order, segments.inverse, top_k)


def rows_by_token(y: Tensor, segments: Segments) -> Tensor:
    """y[tokens·top_k, N] sorted by expert -> the same rows by token, and of one in the order of its choices."""
    return _Copies.apply(y, segments.inverse, segments.order, 1)


class _Copies(torch.autograd.Function):
    """y_j = x[order_j // copies]; dx_i is the sum of its copies' dy, gathered: deterministic, as atomics are not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.inverse, ctx.copies = inverse, copies
        return x.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        rows = dy.index_select(0, ctx.inverse)
        return rows if ctx.copies == 1 else rows.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def gated_activation(h: Tensor, activation: str, has_gate: bool) -> Tensor:
    """a = act(e)·u of h[M, 2·I] = [e | u], or act(h), in float32 or wider, rounded once, as `lora_glu_mlp`; saves h alone.

    By the first backend that can, and in a compiled graph by PyTorch's operations, which its compiler fuses.
    """
    return _GatedActivation.apply(h, activation, has_gate)


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: str, has_gate: bool) -> Tensor:
        ctx.save_for_backward(h)
        ctx.options = activation, has_gate
        ctx.backend = pytorch if torch.compiler.is_compiling() else _backend(h)
        return ctx.backend.activated(h, activation, has_gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, da: Tensor) -> tuple[Tensor, None, None]:
        (h,) = ctx.saved_tensors
        return ctx.backend.activated_backward(da, h, *ctx.options), None, None


def _backend(h: Tensor) -> Any:
    return next(m for m in plan.modules("activation") if m.why_not(h) is None)
