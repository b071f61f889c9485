"""Which gradients autograd asks for, and their order: x's first, then each member's in the order of its fields."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..values import Grads, LoRAWeights, Needs, flatten
from .definition import Members


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


def leaves(x: Tensor, members: Members, order: list[tuple[int, str]]) -> list[Tensor]:
    """The tensors of the wanted gradients, which `keys` gives."""
    return [x if i < 0 else getattr(members[i], name) for i, name in order]


def places(members: Members, needs: Needs) -> list[int]:
    """Where `leaves` stand among the tensors in the pieces of a call, which begin with x and the members."""
    at, where = 1, {(-1, "x"): 0}
    for i, member in enumerate(members):
        for name, value in zip(member._fields, member, strict=True):
            where[i, name] = at
            at += len(flatten(value).tensors)
    return [where[key] for key in keys(needs)]


def in_order(grads: Grads, order: list[tuple[int, str]]) -> list[Tensor | None]:
    """The wanted gradients as `keys` orders them; None for those of members whose result was not used."""
    return [grads.x if i < 0 else grads.members[i].get(name) for i, name in order]


Like = list[tuple[torch.Size | None, torch.dtype]]
"""Of each tensor with a wanted gradient its shape, None for x's, and dtype."""


def like_of(x: Tensor, members: Members, order: list[tuple[int, str]]) -> Like:
    """What `like_leaves` makes the gradients like; x's shape is not kept, for it may differ from call to call."""
    return [(None if t is x else t.shape, t.dtype) for t in leaves(x, members, order)]


def like_leaves(grads: Sequence[Tensor | None], like: Like, shape: torch.Size) -> list[Tensor | None]:
    """Gradients in the shape and dtype of their tensors; x's is `shape`."""
    return [
        grad if grad is None or (grad.dtype == dtype and grad.shape == (own or shape)) else _like(grad, own or shape, dtype)
        for grad, (own, dtype) in zip(grads, like, strict=True)
    ]


def _like(grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return grad.view(shape).to(dtype)


def used(needs: Needs, grads: Sequence[Tensor | None]) -> Needs:
    """The gradients that are left to compute where only some results were used, of one for each member."""
    if all(grad is not None for grad in grads):
        return needs
    members = [() if grad is None else names for grad, names in zip(grads, needs.members, strict=True)]
    return Needs(needs.x, tuple(members))
