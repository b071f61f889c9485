"""Equations 9 and 10 (reference/glu_mlp.py) between linear layers, which linear.py, whole.py or those of backends/cpu compute.

Forward, a = act(e)·u is computed a chunk of rows at a time, which down reads while it is in the cache. Backward, it is computed
once more, for down's gradients; then de and du take da's memory and a's.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...mask import row_chunks
from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, following
from . import linear
from .activation import gated, gated_backward

FIELDS = linear.FIELDS
notes = linear.notes


def plan(call: Call) -> Plan:
    """PyTorch computes with any tensors that pass the checks."""
    return Plan("torch", "the first that can compute this call", *through(linear.way_of(call)))


def through(way: ModuleType) -> list[Callable[..., Any]]:
    """Forward and backward, whose linear layers a module computes that has linear.py's two functions."""
    return [functools.partial(function, way) for function in (forward, backward)]


def forward(
    way: ModuleType, x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None, activation: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """((y,), (e, u, h of every member)); without a gate there is no e. way: the module that computes the linear layers."""
    outputs, hs = way.forward(x, members[:-1], dropout)
    y, h = _down(way, outputs, members[-1], following(dropout, len(members) - 1), activation)
    return (y,), (*outputs, *hs, h)


def _down(
    way: ModuleType, outputs: tuple[Tensor, ...], down: LoRAWeights, dropout: Dropout | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """(y, h) of down over a. A 4-bit weight is decoded once, for all rows together."""
    *gate, u = outputs
    e = gate[0] if gate else None
    chunks = [slice(0, len(u))] if isinstance(down.weight, NF4Weight) else row_chunks(len(u), u.shape[1], u.device)
    if len(chunks) == 1:
        (y,), (h,) = way.forward(gated(e, u, activation), (down,), dropout)
        return y, h
    y, a = u.new_empty(len(u), down.weight.shape[0]), u.new_empty(chunks[0].stop, u.shape[1])
    h = None if down.lora_A is None else down.lora_A.new_empty(len(u), down.lora_A.shape[0])
    for rows in chunks:
        a_rows = gated(None if e is None else e[rows], u[rows], activation, a[: rows.stop - rows.start])
        (y[rows],), (h_rows,) = way.forward(a_rows, (down,), dropout, first=rows.start)
        if h is not None:
            h[rows] = h_rows
    return y, h


def backward(
    way: ModuleType,
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    saved: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
    activation: str,
) -> Grads:
    """Equations 10, and 3 to 6 of every member. What no wanted gradient reads may be None: see functional/glu_mlp.py."""
    count = len(members) - 1
    *gate, u = saved[:count]
    e, hs, (*of_inner, wanted) = gate[0] if gate else None, saved[count:], needs.members
    through = needs.x or any(of_inner)
    a = gated(e, u, activation) if u is not None and ("lora_A" in wanted or "weight" in wanted) else None
    own = Needs(through, (wanted,))
    da, found = way.backward(dys, a, members[count:], hs[count:], following(dropout, count), own)
    if not through:
        return Grads(None, (*({} for _ in of_inner), *found))
    du = a if a is not None and e is not None else da if e is None else torch.empty_like(da)
    gated_backward(da, e, u, activation, None if e is None else da, du)  # 10
    between = (du,) if e is None else (da, du)
    dx, inner = way.backward(between, x, members[:count], hs[:count], dropout, Needs(needs.x, tuple(of_inner)))
    return Grads(dx, (*inner, *found))
