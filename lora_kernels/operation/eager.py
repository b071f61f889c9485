"""A call in eager mode: it chooses its plan once and autograd keeps it."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from ..dtypes import without_autocast
from ..values import Dropout, flatten
from . import library
from .definition import Members, Operation, compute_dtype, in_dtype, no_second_derivative, rows_of, seeded
from .gradients import in_order, leaves, like_leaves, used
from .prepared import Prepared, prepare


def call(
    operation: Operation, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...] = ()
) -> tuple[Tensor, ...]:
    """The operation's results, each [M, ·], with gradients for x and every tensor of the members.

    dropout's seed may be None, which draws one, or an int. Raises what the operation's check raises, before a seed is drawn.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        operation.check(x, members, dropout, *options)
        return library.call(operation, compute_dtype(x, members), x, members, seeded(dropout, x.device), options)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        refuse_transforms(operation.public, x, members)
    prepared = prepare(operation, x, members, dropout, options)
    dropout = seeded(dropout, x.device)
    if prepared.order:
        return _apply(prepared, (x, members, dropout, options), *leaves(x, members, prepared.order))
    return _forward(prepared, x, members, dropout, options)[0]


def _forward(
    prepared: Prepared, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(the results, what they save for the backward pass)."""
    dtype = prepared.dtype
    x, members = rows_of(x, dtype), members if prepared.as_is else in_dtype(members, dtype)
    if not torch._C._is_any_autocast_enabled():
        return prepared.plan.forward(x, members, dropout, *options)
    with without_autocast(x.device):
        return prepared.plan.forward(x, members, dropout, *options)


class OperationFunction(torch.autograd.Function):
    """An operation's results, differentiable once."""

    @staticmethod
    def forward(ctx: Any, prepared: Prepared, arguments: tuple[Any, ...], *own: Tensor) -> tuple[Tensor, ...]:
        x, members, dropout, options = arguments  # in a tuple, which hides them from autograd: it is to see `own` alone
        results, saved = _forward(prepared, x, members, dropout, options)
        tensors, ctx.numbers = prepared.saved(x, members, saved, dropout, options)
        ctx.save_for_backward(*tensors)  # a setup_context of its own would cost 50 µs per call (torch 2.13)
        ctx.set_materialize_grads(False)
        ctx.prepared, ctx.shape = prepared, x.shape
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        prepared: Prepared = ctx.prepared
        present = [grad for grad in grads if grad is not None]
        if not present:
            return (None,) * (2 + len(prepared.order))
        if torch._C._functorch.is_legacy_batchedtensor(present[0]):  # is_grads_batched
            refuse(prepared.operation.public, "a backward pass of several gradients at once does")
        if torch.is_grad_enabled():  # create_graph=True
            gradients = functools.partial(_backward, prepared, ctx.numbers, ctx.shape)
            return None, None, *DifferentiableOnce.apply(prepared.operation.public, gradients, *grads, *ctx.saved_tensors)
        return None, None, *_backward(prepared, ctx.numbers, ctx.shape, *grads, *ctx.saved_tensors)


# Function.apply without its look for a setup_context and for torch.func's wrappers, which are refused above: 3 µs of Python
_apply = super(torch.autograd.Function, OperationFunction).apply


def _backward(
    prepared: Prepared, numbers: list[float], shape: torch.Size, *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The wanted gradients in order, from those of the results and what was saved; x had this shape."""
    count = prepared.results
    dys, form = tensors[:count], prepared.form
    x, members, saved, dropout, options = form.build(tensors[count:], numbers)  # type: ignore[union-attr]
    dtype, needs = prepared.dtype, prepared.needs if count == 1 else used(prepared.needs, dys)
    x, members = None if x is None else rows_of(x, dtype), members if prepared.as_is else in_dtype(members, dtype)
    if not torch._C._is_any_autocast_enabled():
        found = prepared.plan.backward(dys, x, members, saved, dropout, needs, *options)
    else:
        with without_autocast(next(dy for dy in dys if dy is not None).device):
            found = prepared.plan.backward(dys, x, members, saved, dropout, needs, *options)
    return tuple(like_leaves(in_order(found, prepared.order), prepared.like, shape))


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
    if torch._C._are_functorch_transforms_active():
        refuse(public, "torch.func's transforms do")
    tensors = flatten((x, members)).tensors if forward_ad._current_level >= 0 else ()
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        refuse(public, "forward-mode AD does")


def refuse(public: str, what: str) -> NoReturn:
    raise RuntimeError(
        f"{public}: {what} not go through these kernels; use torch.autograd for one gradient at a time, "
        "or compute the layer with plain PyTorch operations"
    )
