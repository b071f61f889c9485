"""What an operation is, and the one way from a call to a backend and to autograd, for every operation.

In eager mode a call chooses its plan once and autograd keeps it: the backward pass runs where the forward pass ran, in any
thread and under any `use_backend`. `torch.compile` and `torch.export` see two registered operators per operation,

    torch.ops.lora_kernels.<name>           the results, and what they save for the backward pass
    torch.ops.lora_kernels.<name>_backward  the wanted gradients, in the order of their tensors

of one schema, whose arguments are the pieces (values.flatten) of all arguments, the backend setting of the moment among them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from . import backends as backends  # registers them
from . import plan as registry
from .dtypes import autocast_dtype, without_autocast
from .nf4 import NF4Weight
from .plan import Plan, choose, describe
from .values import Dropout, Grads, LoRAWeights, Needs, flatten, unflatten

Members = tuple[LoRAWeights, ...]


class Operation(NamedTuple):
    """An operation on x[..., K] and its members, whose results are [M, ·] tensors.

    name: its basename in every layer. public: the function that users call, for messages.
    check(x, members, dropout, *options): raises for arguments that do not fit.
    shapes(x, members, *options) -> (shapes of the results, shapes of what is saved), of dtypes x's and lora_A's.
    kept(x, members, saved, dropout, needs): the same four with None for whatever no wanted gradient reads.
    gradient_shapes(grads, x, members, saved, needs) -> (shape, dtype) of each wanted gradient in order.
    """

    name: str
    public: str
    check: Callable[..., None]
    shapes: Callable[..., Any]
    kept: Callable[..., tuple]
    gradient_shapes: Callable[..., list[tuple[tuple[int, ...], torch.dtype]]]


OPERATIONS: dict[str, Operation] = {}


def call(
    operation: Operation, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...] = ()
) -> tuple[Tensor, ...]:
    """The operation's results on checked arguments, each [M, ·], with gradients for x and every tensor of the members."""
    dtype = compute_dtype(x, members)
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        members = tuple([_with_tensor_scaling(m, wide, x.device) for m in members])
        pieces = flatten((registry.setting, dtype, x, members, dropout, options))
        results = getattr(torch.ops.lora_kernels, operation.name)(*pieces)
        return tuple(results[: len(operation.shapes(x, members, *options)[0])])
    refuse_transforms(operation.public, x, members)
    needs = wanted(x, members) if torch.is_grad_enabled() else Needs(False, ((),) * len(members))
    arguments = x, members, dropout, options
    if not (own := leaves(x, members, needs)):
        return compute(operation, registry.setting, dtype, *arguments)[1]
    return OperationFunction.apply(operation, dtype, needs, arguments, *own)


def compute(
    operation: Operation,
    setting: str,
    dtype: torch.dtype,
    x: Tensor,
    members: Members,
    dropout: Dropout | None,
    options: tuple[Any, ...],
) -> tuple[Plan, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(who computes, the results, what they save for the backward pass)."""
    x, members = rows_of(x, dtype), in_dtype(members, dtype)
    plan = choose(describe(operation.name, setting, dtype, x, members, dropout, options))
    with without_autocast(x.device):
        return plan, *plan.forward(x, members, dropout, *options)


def compute_dtype(x: Tensor, members: Members) -> torch.dtype:
    """autocast's dtype where it applies (never to float64), otherwise a dense weight's, or x's with a 4-bit one."""
    weight, narrow = members[0].weight, autocast_dtype(x.device)
    if narrow is not None and torch.float64 not in (x.dtype, weight.dtype):
        return narrow
    return x.dtype if isinstance(weight, NF4Weight) else weight.dtype


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x[..., K] as [M, K] in `dtype`."""
    return x if x.ndim == 2 and x.dtype == dtype else x.reshape(-1, x.shape[-1]).to(dtype)


def in_dtype(members: Members, dtype: torch.dtype) -> Members:
    """Weights and biases read as `dtype`; a 4-bit weight as it is, for its product rounds it."""
    return tuple([_read_as(member, dtype) for member in members])


def _read_as(member: LoRAWeights, dtype: torch.dtype) -> LoRAWeights:
    weight, bias = member.weight, member.bias
    if isinstance(weight, Tensor) and weight.dtype != dtype:
        member = member._replace(weight=weight.to(dtype))
    return member if bias is None or bias.dtype == dtype else member._replace(bias=bias.to(dtype))


def _with_tensor_scaling(member: LoRAWeights, dtype: torch.dtype, device: torch.device) -> LoRAWeights:
    """A number would be a part of the graph, and another one a new graph. torch 2.8 traces no _replace."""
    s = member.scaling if isinstance(member.scaling, Tensor) else torch.full((), member.scaling, dtype=dtype, device=device)
    values: list[Any] = [s if name == "scaling" else v for name, v in zip(LoRAWeights._fields, member, strict=True)]
    return LoRAWeights(*values)


# ---- gradients ----


def wanted(x: Tensor, members: Members) -> Needs:
    """The gradients that autograd asks for."""
    return Needs(x.requires_grad, tuple([_trained(member) for member in members]))


def _trained(member: LoRAWeights) -> tuple[str, ...]:
    pairs = zip(member._fields, member, strict=True)
    return tuple([name for name, value in pairs if isinstance(value, Tensor) and value.requires_grad])


def keys(needs: Needs) -> list[tuple[int, str]]:
    """The wanted gradients in order: x's first, as (-1, "x"), then (member, field)."""
    fields = [(i, name) for i, names in enumerate(needs.members) for name in names]
    return [(-1, "x"), *fields] if needs.x else fields


def leaves(x: Tensor, members: Members, needs: Needs) -> list[Tensor]:
    """The tensors of the wanted gradients."""
    return [x if i < 0 else getattr(members[i], name) for i, name in keys(needs)]


def places(members: Members, needs: Needs) -> list[int]:
    """Where `leaves` stand among the tensors in the pieces of a call, which begin with x and the members."""
    at, where = 1, {(-1, "x"): 0}
    for i, member in enumerate(members):
        for name, value in zip(member._fields, member, strict=True):
            where[i, name] = at
            at += len(flatten(value).tensors)
    return [where[key] for key in keys(needs)]


def in_order(grads: Grads, needs: Needs) -> list[Tensor | None]:
    """The wanted gradients as `keys` orders them; None for those of members whose result was not used."""
    return [grads.x if i < 0 else grads.members[i].get(name) for i, name in keys(needs)]


def _like(grads: Sequence[Tensor | None], like: list[tuple[torch.Size, torch.dtype]]) -> list[Tensor | None]:
    """Gradients in the shape and dtype of their tensors."""
    return [
        grad if grad is None or (grad.dtype == dtype and grad.shape == shape) else grad.view(shape).to(dtype)
        for grad, (shape, dtype) in zip(grads, like, strict=True)
    ]


def used(needs: Needs, grads: Sequence[Tensor | None]) -> Needs:
    """The gradients that are left to compute where only some results were used: one for each member."""
    members = [() if grad is None else names for grad, names in zip(grads, needs.members, strict=True)]
    return Needs(needs.x, tuple(members))


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
        return None, None, None, None, *_like(found, ctx.like)


class DifferentiableOnce(torch.autograd.Function):
    """A backward pass under create_graph=True: its own derivative is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, public: str, gradients: Callable[..., tuple], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.public = public
        return gradients(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        no_second_derivative(ctx.public)


def no_second_derivative(public: str) -> NoReturn:
    raise RuntimeError(
        f"{public}: the second derivative is not implemented; "
        "for a gradient penalty or a Hessian compute the layer with plain PyTorch operations"
    )


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


# ---- torch.library: what a compiler sees ----

_library = torch.library.Library("lora_kernels", "DEF")
SCHEMA = "(Tensor[] tensors, float[] numbers, str spec) -> Tensor[]"


def register(operation: Operation) -> Operation:
    """Make the operation known, and its two operators to torch.library."""
    name = operation.name

    def forward(*pieces: Any) -> list[Tensor]:
        setting, dtype, x, members, dropout, options = unflatten(*pieces)
        operation.check(x, members, dropout, *options)
        _, results, saved = compute(operation, setting, dtype, x, members, dropout, options)
        return [*results, *saved]

    def forward_fake(*pieces: Any) -> list[Tensor]:
        _, dtype, x, members, _, options = unflatten(*pieces)
        results, saved = operation.shapes(x, members, *options)
        adapters = (m.lora_A for m in members)
        return [x.new_empty(s, dtype=dtype) for s in results] + [A.new_empty(s) for A, s in zip(adapters, saved, strict=True)]

    def backward(*pieces: Any) -> list[Tensor]:
        setting, dtype, grads, x, members, saved, dropout, needs, options = unflatten(*pieces)
        x = None if x is None else rows_of(x, dtype)
        members = in_dtype(members, dtype)
        first = next(grad for grad in grads if grad is not None)
        plan = choose(describe(name, setting, dtype, first if x is None else x, members, dropout, options))
        with without_autocast(first.device):
            found = in_order(plan.backward(grads, x, members, saved, dropout, needs, *options), needs)
        return [grad for grad in found if grad is not None]

    def backward_fake(*pieces: Any) -> list[Tensor]:
        _, _, grads, x, members, saved, _, needs, options = unflatten(*pieces)
        shapes = operation.gradient_shapes(grads, x, members, saved, needs, *options)
        return [pieces[0][0].new_empty(shape, dtype=dtype) for shape, dtype in shapes]

    def setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        setting, dtype, x, members, dropout, options = unflatten(*inputs)
        needs, count = wanted(x, members), len(operation.shapes(x, members, *options)[0])
        kept, *ctx.pieces = flatten(operation.kept(x, members, tuple(output[count:]), dropout, needs))
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.needs, ctx.options, ctx.count = (setting, dtype), needs, options, count
        own = leaves(x, members, needs)
        ctx.like = [(t.shape, t.dtype) for t in own]
        ctx.places, ctx.inputs = places(members, needs), len(inputs[0])
        ctx.no_numbers = None if inputs[1] else []  # an empty list counts as one of tensors

    def formula(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list | None, None]:
        into: list[Tensor | None] = [None] * ctx.inputs
        dys = tuple(grads[: ctx.count])
        if ctx.like and any(dy is not None for dy in dys):
            needs = used(ctx.needs, dys)
            kept = unflatten(ctx.saved_tensors, *ctx.pieces)
            pieces = flatten((*ctx.call, dys, *kept, needs, ctx.options))
            grads_of = dict(zip(keys(needs), getattr(torch.ops.lora_kernels, f"{name}_backward")(*pieces), strict=True))
            found = _like([grads_of.get(key) for key in keys(ctx.needs)], ctx.like)
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
