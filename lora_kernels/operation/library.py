"""A call as torch.compile and torch.export see it: two operators of one schema for each operation.

The arguments are the pieces (values.flatten) of all of a call's, the backend setting of the moment among them.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import plan as registry
from ..dtypes import wide_dtype, without_autocast
from ..plan import choose, describe
from ..values import Dropout, LoRAWeights, Rows, flatten, unflatten
from .definition import OPERATIONS, Members, Operation, in_dtype, no_second_derivative, rows_of, seeded
from .gradients import in_order, keys, like_leaves, like_of, places, used, wanted


def call(
    operation: Operation,
    dtype: torch.dtype,
    x: Tensor,
    members: Members,
    dropout: Dropout | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """The operation's results, by its registered operator."""
    members = tuple([_with_tensor_scaling(m, wide_dtype(dtype), x.device) for m in members])
    options = tuple([unread(option) if isinstance(option, Rows) else option for option in options])
    pieces = flatten((registry.setting, dtype, x, members, dropout, options))
    results = getattr(torch.ops.lora_kernels, operation.name)(*pieces)
    return tuple(results[: len(operation.shapes(x, members, *options)[0])])


def _with_tensor_scaling(member: LoRAWeights, dtype: torch.dtype, device: torch.device) -> LoRAWeights:
    """A number would be a part of the graph, and another one a new graph. torch 2.8 traces no _replace."""
    s = member.scaling if isinstance(member.scaling, Tensor) else torch.full((), member.scaling, dtype=dtype, device=device)
    values: list[Any] = [s if name == "scaling" else v for name, v in zip(LoRAWeights._fields, member, strict=True)]
    return LoRAWeights(*values)


def unread(rows: Rows) -> Rows:
    """A graph serves segments of any sizes, and so cannot leave a gradient out: that of one without rows is zeros."""
    return Rows(rows.offsets, rows.order, None)


_library = torch.library.Library("lora_kernels", "DEF")
SCHEMA = "(Tensor[] tensors, float[] numbers, str spec) -> Tensor[]"


def register(operation: Operation) -> Operation:
    """Make the operation known, and its two operators to torch.library."""
    name = operation.name

    def forward(*pieces: Any) -> list[Tensor]:
        setting, dtype, x, members, dropout, options = unflatten(*pieces)
        # Read in `dtype` before the check: a compiled graph runs outside of the autocast in which it was traced.
        x, members = x.to(dtype), in_dtype(members, dtype)
        operation.check(x, members, dropout, *options)
        x, dropout = rows_of(x, dtype), seeded(dropout, x.device)
        plan = choose(describe(name, setting, dtype, x, members, dropout, options))
        with without_autocast(x.device):
            results, saved = plan.forward(x, members, dropout, *options)
        return [*results, *(t for t in saved if t is not None)]

    def forward_fake(*pieces: Any) -> list[Tensor]:
        _, dtype, x, members, _, options = unflatten(*pieces)
        results, saved = operation.shapes(x, members, *options)
        kinds = [(shape, dtype) for shape in results] + [kind for kind in saved if kind is not None]
        return [x.new_empty(shape, dtype=own or dtype) for shape, own in kinds]

    def backward(*pieces: Any) -> list[Tensor]:
        setting, dtype, grads, x, members, saved, dropout, needs, options = unflatten(*pieces)
        x = None if x is None else rows_of(x, dtype)
        members = in_dtype(members, dtype)
        first = next(grad for grad in grads if grad is not None)
        plan = choose(describe(name, setting, dtype, first if x is None else x, members, dropout, options))
        with without_autocast(first.device):
            found = in_order(plan.backward(grads, x, members, saved, dropout, needs, *options), keys(needs))
        return [grad for grad in found if grad is not None]

    def backward_fake(*pieces: Any) -> list[Tensor]:
        _, _, grads, x, members, saved, _, needs, options = unflatten(*pieces)
        shapes = operation.gradient_shapes(grads, x, members, saved, needs, *options)
        return [pieces[0][0].new_empty(shape, dtype=dtype) for shape, dtype in shapes]

    def setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        setting, dtype, x, members, dropout, options = unflatten(*inputs)
        needs, (results, kinds) = wanted(x, members), operation.shapes(x, members, *options)
        count, present = len(results), iter(output[len(results) :])
        saved = tuple([None if kind is None else next(present) for kind in kinds])
        kept, *ctx.pieces = flatten((*operation.kept(x, members, saved, dropout, needs), options))
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.needs, ctx.count = (setting, dtype), needs, count
        ctx.like, ctx.shape = like_of(x, members, keys(needs)), x.shape
        ctx.places, ctx.inputs = places(members, needs), len(inputs[0])
        ctx.no_numbers = None if inputs[1] else []  # an empty list counts as one of tensors

    def formula(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list | None, None]:
        into: list[Tensor | None] = [None] * ctx.inputs
        dys = tuple(grads[: ctx.count])
        if ctx.like and any(dy is not None for dy in dys):
            needs = used(ctx.needs, dys)
            *kept, options = unflatten(ctx.saved_tensors, *ctx.pieces)
            pieces = flatten((*ctx.call, dys, *kept, needs, options))
            grads_of = dict(zip(keys(needs), getattr(torch.ops.lora_kernels, f"{name}_backward")(*pieces), strict=True))
            found = like_leaves([grads_of.get(key) for key in keys(ctx.needs)], ctx.like, ctx.shape)
            for place, grad in zip(ctx.places, found, strict=True):
                into[place] = grad
        return into, ctx.no_numbers, None

    def second(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivative(operation.public)

    for suffix, implementation, fake in (("", forward, forward_fake), ("_backward", backward, backward_fake)):
        _library.define(f"{name}{suffix}{SCHEMA}", tags=torch.Tag.pt2_compliant_tag)
        _library.impl(f"{name}{suffix}", implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_kernels::{name}{suffix}", fake, lib=_library)
    torch.library.register_autograd(f"lora_kernels::{name}", formula, setup_context=setup_context)
    torch.library.register_autograd(f"lora_kernels::{name}_backward", second)
    OPERATIONS[name] = operation
    return operation
