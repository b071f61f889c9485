"""Linear layers over segments of rows, each with an adapter of its own, and a weight and a bias of its own or shared.

    14  y[i] = row i of lora_linear(x, W_e, A_e, B_e, c_e), equations 1 and 2 of linear.py, for every row i of x in segment e
    15  the gradients are the sums over e of equations 3 to 6, with dy zero in all rows that are not in e

The mask of row i is that of row i of x, with p_e. A row of no segment has only what is shared: y[i] = x[i]·Wᵀ + c, or less.
Adapters in a list may differ in rank, and one without rows takes no part. h[M, the largest R] is sorted by segment.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..values import Dropout, Grads, LoRAWeights, Needs, Rows
from . import linear
from .nf4 import dense

Members = tuple[LoRAWeights, ...]
FIELDS = ("weight", "lora_A", "lora_B", "bias")
Segment = tuple[int, slice, Tensor, LoRAWeights, Dropout | None]


def segments(x: Tensor, members: Members, dropout: Dropout | None, rows: Rows, ps: tuple[float, ...]) -> Iterator[Segment]:
    """(number, its place among the sorted rows, its rows of x, projection, dropout) of each segment; number -1: of none."""
    (W, A, B, c, s, _), ends = members[0], rows.offsets.tolist()
    W, order = dense(W, x.dtype), torch.arange(len(x), device=x.device) if rows.order is None else rows.order
    shared = W if W.ndim == 2 else W.new_zeros(W.shape[1:]), c if c is None or c.ndim == 1 else None
    yield -1, slice(ends[-1], len(x)), order[ends[-1] :], LoRAWeights(shared[0], None, None, shared[1]), None
    for e, (start, stop) in enumerate(pairwise(ends)):
        if A is not None and B is not None:
            own = LoRAWeights(shared[0] if W.ndim == 2 else W[e], A[e], B[e], c if c is None or c.ndim == 1 else c[e], s)
        elif start < stop:
            own = members[e + 1]._replace(weight=shared[0], bias=shared[1])
        else:
            continue
        p = 0.0 if dropout is None else ps[e] if ps else dropout.p
        yield e, slice(start, stop), order[start:stop], own, dropout._replace(p=p) if dropout is not None and p else None


def forward(
    x: Tensor, members: Members, dropout: Dropout | None, rows: Rows, ps: tuple[float, ...]
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """((y,), (h,))."""
    adapters = [m.lora_A for m in members if m.lora_A is not None]
    h = adapters[0].new_zeros(len(x), max(A.shape[-2] for A in adapters))
    y = x
    for e, place, i, own, drop_e in segments(x, members, dropout, rows, ps):
        (y_e,), (h_e,) = linear.forward(x, (own,), drop_e)
        y = y_e if e < 0 else y.index_copy(0, i, y_e[i])  # 14
        if h_e is not None:
            h[place, : h_e.shape[1]] = h_e[i].detach()
    return (y,), (h,)


def backward(
    dys: tuple[Tensor], x: Tensor, members: Members, saved: tuple[Tensor], dropout: Dropout | None,
    needs: Needs, rows: Rows, ps: tuple[float, ...],
) -> Grads:  # fmt: skip
    """Equation 15."""
    (dy,), (h,), dx = dys, saved, torch.zeros_like(x)
    found: list[dict[str, Any]] = [defaultdict(list) for _ in members]
    for e, place, i, own, drop_e in segments(x, members, dropout, rows, ps):
        fields = FIELDS[::3] if own.lora_A is None else FIELDS
        dy_e, h_e = torch.zeros_like(dy).index_copy(0, i, dy[i]), h.new_zeros(h.shape).index_copy(0, i, h[place])
        h_e = h_e if own.lora_A is None else h_e[:, : own.lora_A.shape[0]]
        part, (grads,) = linear.backward((dy_e,), x, (own,), (h_e,), drop_e, Needs(True, (fields,)))
        dx = dx + part  # type: ignore[operator]  # 15
        for name, grad in grads.items():
            found[e + 1 if len(members) > 1 and "lora" in name else 0][name].append(grad)
    for member, parts in zip(members, found, strict=True):
        for name in parts:
            (like, grads), plain = (getattr(member, name), parts[name]), 1 if name == "bias" else 2
            parts[name] = sum(grads) if like is None or like.ndim == plain else torch.stack(grads[-len(like) :])
    wanted = [{name: parts[name] for name in names if name in parts} for parts, names in zip(found, needs.members, strict=True)]
    return Grads(dx if needs.x else None, tuple(wanted))
