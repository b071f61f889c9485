"""A call in eager mode: it chooses its plan once and autograd keeps it."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from .. import plan as registry
from ..dtypes import without_autocast
from ..values import Dropout, Needs, flatten, unflatten
from . import library
from .definition import Members, Operation, compute, compute_dtype, in_dtype, no_second_derivative, rows_of
from .gradients import in_order, leaves, like_leaves, used, wanted


def call(
    operation: Operation, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...] = ()
) -> tuple[Tensor, ...]:
    """The operation's results on checked arguments, each [M, ·], with gradients for x and every tensor of the members."""
    dtype = compute_dtype(x, members)
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return library.call(operation, dtype, x, members, dropout, options)
    refuse_transforms(operation.public, x, members)
    needs = wanted(x, members) if torch.is_grad_enabled() else Needs(False, ((),) * len(members))
    arguments = x, members, dropout, options
    if not (own := leaves(x, members, needs)):
        return compute(operation, registry.setting, dtype, *arguments)[1]
    return OperationFunction.apply(operation, dtype, needs, arguments, *own)


class OperationFunction(torch.autograd.Function):
    """An operation's results, differentiable once."""

    @staticmethod
    def forward(ctx: Any, operation: Operation, dtype: torch.dtype, needs: Needs, arguments: tuple, *own: Tensor) -> Any:
        x, members, dropout, options = arguments
        plan, results, saved = compute(operation, registry.setting, dtype, *arguments)
        kept, *ctx.pieces = flatten(operation.kept(x, members, saved, dropout, needs))
        ctx.save_for_backward(*kept)  # a setup_context of its own would cost 50 µs per call (torch 2.13)
        ctx.set_materialize_grads(False)
        ctx.public, ctx.plan, ctx.dtype, ctx.needs, ctx.options = operation.public, plan, dtype, needs, options
        ctx.like = [(t.shape, t.dtype) for t in own]
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(ctx.like))

        def gradients(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
            dys, kept = tensors[: len(grads)], tensors[len(grads) :]
            x, members, saved, dropout = unflatten(kept, *ctx.pieces)
            x = None if x is None else rows_of(x, ctx.dtype)
            needs = used(ctx.needs, grads)
            with without_autocast(next(dy for dy in dys if dy is not None).device):
                found = ctx.plan.backward(dys, x, in_dtype(members, ctx.dtype), saved, dropout, needs, *ctx.options)
            return tuple(in_order(found, ctx.needs))

        tensors = (*grads, *ctx.saved_tensors)
        once = torch.is_grad_enabled()  # create_graph=True
        found = DifferentiableOnce.apply(ctx.public, gradients, *tensors) if once else gradients(*tensors)
        return None, None, None, None, *like_leaves(found, ctx.like)


class DifferentiableOnce(torch.autograd.Function):
    """A backward pass under create_graph=True: its own derivative is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, public: str, gradients: Callable[..., tuple], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.public = public
        return gradients(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        no_second_derivative(ctx.public)


def refuse_transforms(public: str, x: Tensor, members: Members) -> None:
    """Raise RuntimeError under torch.func's transforms, and for tensors with a tangent of forward-mode AD.

    Autograd is given only the tensors whose gradient is wanted: a transform of the others would be lost without a word.
    """
    what = "torch.func's transforms do"
    if not torch._C._are_functorch_transforms_active():
        tensors = flatten((x, members)).tensors if forward_ad._current_level >= 0 else ()
        if all(forward_ad.unpack_dual(t).tangent is None for t in tensors):
            return
        what = "forward-mode AD does"
    raise RuntimeError(
        f"{public}: {what} not go through these kernels; use torch.autograd, or compute the layer with plain PyTorch operations"
    )
