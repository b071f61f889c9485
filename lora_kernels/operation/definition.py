"""What an operation is, and how a call reads its arguments: in which dtype, as rows, with which seed."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import backends as backends  # registers them
from ..dtypes import autocast_dtype
from ..mask import as_seed, draw_seed
from ..nf4 import NF4Weight
from ..values import Dropout, LoRAWeights

Members = tuple[LoRAWeights, ...]


class Operation(NamedTuple):
    """An operation on x[..., K] and its members, whose results are [M, ·] tensors.

    Options are hashable values, or `Rows`, whose tensors are saved whole.

    name: its basename in every layer. public: the function that users call, for messages.
    check(x, members, dropout, *options): raises for arguments that do not fit.
    shapes(x, members, *options) -> (shapes of the results; of what is saved (shape, dtype), with None for the results' dtype,
        or None for what this call does not have). There is one result for each member, or a single one.
    kept(x, members, saved, dropout, needs): these four with None for whatever no wanted gradient reads.
    gradient_shapes(grads, x, members, saved, needs) -> (shape, dtype) of each wanted gradient in order.
    """

    name: str
    public: str
    check: Callable[..., None]
    shapes: Callable[..., Any]
    kept: Callable[..., tuple]
    gradient_shapes: Callable[..., list[tuple[tuple[int, ...], torch.dtype]]]


OPERATIONS: dict[str, Operation] = {}


def seeded(dropout: Dropout | None, device: torch.device) -> Dropout | None:
    """dropout with a seed on `device`: the one that it has, or one that is drawn."""
    if dropout is None:
        return None
    seed = draw_seed(device) if dropout.seed is None else as_seed(dropout.seed, device)
    return Dropout(dropout.p, seed, dropout.offset)


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


def no_second_derivative(public: str) -> NoReturn:
    raise RuntimeError(
        f"{public}: the second derivative is not implemented; "
        "for a gradient penalty or a Hessian compute the layer with plain PyTorch operations"
    )
