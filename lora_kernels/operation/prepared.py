"""What the calls of one kind have in common, found out once: that they pass the checks, who computes, which gradients.

A kind is all that those depend on: layouts, dtypes and devices of the tensors, which of them want a gradient, the number of
rows up to the next power of two, dropout, autocast, use_backend's setting, and the backends' state (plan.changed). Arguments
that do not fit are of no kind: they raise.
"""

from typing import Any

import torch
from torch import Tensor

from .. import plan as registry
from ..dtypes import autocast_dtype
from ..nf4 import NF4Weight
from ..plan import choose, describe, layout
from ..values import Dropout, Form, LoRAWeights, Needs, flatten, form_of
from .definition import Members, Operation, compute_dtype, in_dtype, rows_of
from .gradients import keys, like_of, wanted

LIMIT = 4096  # kinds that are kept, of about 1 KB each; a model has one for each shape of layer and range of rows
DEFAULTS = tuple(LoRAWeights._field_defaults.get(name) for name in LoRAWeights._fields)

_kinds: dict[tuple, "Prepared"] = {}


class Prepared:
    """What the calls of one kind have in common. Raises what the operation's check raises."""

    __slots__ = ("as_is", "dtype", "form", "like", "needs", "operation", "order", "plan", "results")

    def __init__(self, operation: Operation, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...]):
        operation.check(x, members, dropout, *options)
        self.operation = operation
        self.dtype = compute_dtype(x, members)
        self.needs = wanted(x, members) if torch.is_grad_enabled() else Needs(False, ((),) * len(members))
        self.order = keys(self.needs)
        self.like = like_of(x, members, self.order)
        read = in_dtype(members, self.dtype)
        self.as_is = all(after is before for after, before in zip(read, members, strict=True))
        self.results = len(operation.shapes(x, members, *options)[0])
        rows = rows_of(x, self.dtype)
        self.plan = choose(describe(operation.name, registry.setting, self.dtype, rows, read, dropout, options))
        self.form: Form | None = None  # of what is saved for the backward pass, known from the first call on

    def saved(
        self, x: Tensor, members: Members, saved: tuple, dropout: Dropout | None, options: tuple[Any, ...]
    ) -> tuple[list[Tensor], list[float]]:
        """The tensors and numbers that the wanted gradients read, of which `form` makes the five again."""
        if self.form is None:
            kept = self.operation.kept(x, members, saved, dropout, self.needs)
            self.form = form_of(flatten((*kept, options)).text)
        return self.form.read((x, members, saved, dropout, options))


def prepare(operation: Operation, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...]) -> Prepared:
    """What the calls of this one's kind have in common."""
    try:
        kind = _kind(operation, x, members, dropout, options)
        if (found := _kinds.get(kind)) is not None:
            return found
    except (AttributeError, IndexError, RuntimeError, TypeError):  # no tensor where one should be, or one without an address
        return Prepared(operation, x, members, dropout, options)
    found = Prepared(operation, x, members, dropout, options)
    if len(_kinds) >= LIMIT:
        _kinds.clear()
    _kinds[kind] = found
    return found


def _kind(operation: Operation, x: Tensor, members: Members, dropout: Dropout | None, options: tuple[Any, ...]) -> tuple:
    K = x.shape[-1]
    if K and x.is_contiguous():
        M = x.numel() // K
        rows: Any = (M - 1).bit_length() if M else None
    else:
        rows = x.shape, x.stride()
    own = K, rows, x.dtype, x.device, x.requires_grad, not x.data_ptr() & 15, x.__class__
    fields: list[Any] = []
    for member in members:
        for value, default in zip(member, DEFAULTS):  # noqa: B905  # strict takes as long as a field
            if isinstance(value, Tensor):  # and no function for it: this runs for each tensor of each call
                place, aligned = value.device, not value.data_ptr() & 15
                fields.append((value.shape, value.stride(), value.dtype, place, value.requires_grad, aligned, value.__class__))
            else:
                fields.append(value if value is None else _field(value, default))
    drop = None if dropout is None else (dropout.p, dropout.offset)
    narrow = autocast_dtype(x.device) if torch._C._is_any_autocast_enabled() else None
    about = operation.name, registry.setting, registry.state, torch.is_grad_enabled(), narrow
    return *about, own, tuple(fields), drop, tuple([layout(option) for option in options]) if options else options


def _field(value: Any, default: Any) -> Any:
    """What a plan may depend on of a field that is no tensor: of a number only whether it is the default."""
    if isinstance(value, NF4Weight):
        return tuple([_layout(field) if isinstance(field, Tensor) else field for field in value.fields()])
    return (float, value == default) if value.__class__ is float else value


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad, not t.data_ptr() & 15, t.__class__
