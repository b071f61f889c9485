"""Equations 14 and 15 (reference/grouped_linear.py) on a CPU: one call of csrc/cpu each way for all segments' low-rank parts.

PyTorch needs ten operations for a segment, 80 to 120 µs of the host, and copies of the rows where they lie in no order. As in
linear.py the base product comes first in float32 and float64, of all rows over a shared weight, else of each segment's; in 16
bits, and over weights in 4 bits or with biases of their own, it is added to the low-rank parts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import cpu_extension
from ...cpu_extension import NAMES, PLAIN
from ...cpu_extension import rows as rows_of
from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, Rows
from ..torch import grouped_linear as pytorch
from ..torch import nf4_product
from ..torch.engine import add_backward_product, add_forward_product, sum_dtype, to
from ..torch.nf4 import one_tile
from ..torch.segments import Members, ends, numbers, places, weight_of
from . import linear
from .linear import adjacent, mask_of, product_is_first, scale_and_threshold

FIELDS = pytorch.FIELDS
Matrix = tuple[int, int, str] | None  # as cpu_extension.rows


def plan(call: Call) -> Plan | str:
    """The loops of csrc/cpu for this call, or the reason why there are none."""
    (_, offsets, *_), _ = call.options
    return linear.refusal(call, offsets[0] - 1) or Plan("cpu", linear.WHY, forward, backward)


def forward(
    x: Tensor, members: Members, dropout: Dropout | None, rows: Rows, ps: tuple[float, ...]
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """((y[M, N] in x's dtype,), (h[M, the largest R] in the adapters',))."""
    x, members, M = adjacent(x), _adjacent(members), len(x)
    W, c, bounds = members[0].weight, members[0].bias, ends(rows, M)
    before = _is_first(x, W, c)
    y = _product(x, W, c, bounds, rows) if before else x.new_empty(M, W.shape[-2], dtype=sum_dtype(x, W))
    adapters = [member.lora_A for member in members if member.lora_A is not None]
    ranks = [A.shape[-2] for A in adapters]
    h = (adapters[0].new_zeros if bounds[-1] < M or min(ranks) < max(ranks) else adapters[0].new_empty)(M, max(ranks))
    added = None if before or c is None else adjacent(c) if c.ndim == 1 else adjacent(c).unsqueeze(1)
    parts = _parts(members, dropout, ps, bounds, lambda e: (_nth(added, e), None, None, None))
    term = parts, x.shape[1], y.shape[1], *mask_of(dropout, 0)[2:], _address(rows.order)
    cpu_extension.extension.grouped_forward(*term, rows_of(x), rows_of(y), before, rows_of(h), torch.get_num_threads())
    if not before:
        y[numbers(rows.order, slice(bounds[-1], M))] = 0 if c is None or c.ndim == 2 else to(c, y.dtype)
        _add_products(add_forward_product, y, x, W, bounds)
    return (to(y, x.dtype),), (h,)


def backward(
    dys: tuple[Tensor],
    x: Tensor | None,
    members: Members,
    saved: tuple[Tensor | None],
    dropout: Dropout | None,
    needs: Needs,
    rows: Rows,
    ps: tuple[float, ...],
) -> Grads:
    """Equation 15, as grouped_linear.backward of backends/torch."""
    if type(dys[0]) not in PLAIN:
        return pytorch.backward(dys, x, members, saved, dropout, needs, rows, ps)
    dy, h, x, members = adjacent(dys[0]), adjacent(saved[0]), adjacent(x), _adjacent(members)
    W, bounds, dx = members[0].weight, ends(rows, len(dy)), None
    before = needs.x and _is_first(dy, W)
    if before:
        dx = _product(dy, (one_tile(W, dy.dtype) if isinstance(W, NF4Weight) else W).mT, None, bounds, rows)
    elif needs.x:
        dx = dy.new_empty(len(dy), W.shape[-1], dtype=sum_dtype(dy, W))
        dx[numbers(rows.order, slice(bounds[-1], len(dy)))] = 0
    grads = pytorch.begun(dy, x, members, needs, rows)
    parts = _parts(members, dropout, ps, bounds, lambda e: (None, *_gradients_of(e, grads, members, needs, x)))
    K = 0 if dx is None and x is None else (x if dx is None else dx).shape[1]
    term = parts, K, dy.shape[1], *mask_of(dropout, 0)[2:], _address(rows.order)
    read = rows_of(x), rows_of(dy), rows_of(h)
    cpu_extension.extension.grouped_backward(*term, *read, rows_of(dx), before, torch.get_num_threads())
    if needs.x and not before:
        _add_products(add_backward_product, dx, dy, W, bounds)
    pytorch.of_base(grads[0], dy, x, members[0], needs.members[0], bounds)
    return Grads(None if dx is None else to(dx, dy.dtype), tuple(grads))


# ---- the base products, where a stack's matrix is that of a segment ----


def _is_first(v: Tensor, W: Tensor | NF4Weight, c: Tensor | None = None) -> bool:
    """Whether the low-rank parts are added to the base products, and not the other way round."""
    if len(W.shape) == 2:
        return product_is_first(v, W) and (c is None or c.ndim == 1)
    return product_is_first(v, W) and c is None and not isinstance(W, NF4Weight)


def _product(v: Tensor, W: Tensor | NF4Weight, c: Tensor | None, bounds: list[int], rows: Rows) -> Tensor:
    """v·Wᵀ + c; of a stack zeros in rows of no segment."""
    if len(W.shape) == 2:
        return nf4_product.linear(v, W, c) if isinstance(W, NF4Weight) else F.linear(v, W, c)
    if hasattr(F, "grouped_mm") and _has_whole_16_bytes(v) and _has_whole_16_bytes(W) and W.shape[1] % 4 == 0:
        y = F.grouped_mm(v, W.mT, offs=rows.offsets[1:])
    else:
        y = v.new_empty(len(v), W.shape[1])
        for e, place in places(bounds):
            torch.mm(v[place], W[e].T, out=y[place])
    y[bounds[-1] :] = 0
    return y


def _has_whole_16_bytes(t: Tensor) -> bool:
    """Whether grouped_mm takes t: float32, rows and matrices of a stack of whole 16 bytes, from a multiple of them on."""
    inner, *outer = sorted(t.stride())
    whole = inner == 1 and all(stride % 4 == 0 for stride in outer)
    return whole and t.dtype == torch.float32 and t.data_ptr() % 16 == 0


def _add_products(add: Callable[..., Tensor], out: Tensor, v: Tensor, W: Tensor | NF4Weight, bounds: list[int]) -> None:
    """add(out, v, W), or that of each segment's rows."""
    if len(W.shape) == 2:
        add(out, v, W)
    else:
        for e, place in places(bounds):
            add(out[place], v[place], weight_of(W, e))


# ---- what csrc/cpu takes ----


def _parts(
    members: Members, dropout: Dropout | None, ps: tuple[float, ...], bounds: list[int], results: Callable[[int], tuple]
) -> list[tuple]:
    """Of each segment with rows their place, its rank, A, B, scalings, threshold and `results`: c, dA, dB, dc."""
    found, p = [], 0.0 if dropout is None else dropout.p
    for e, place in places(bounds):
        _, A, B, _, s, _ = members[0 if len(members) == 1 else e + 1]
        drop = scale_and_threshold(ps[e] if ps else p)
        R = 0 if B is None else B.shape[-1]
        found.append((place.start, place.stop, R, _nth(A, e), _nth(B, e), float(s), *drop, *results(e)))
    return found


def _gradients_of(
    e: int, grads: list[dict[str, Tensor]], members: Members, needs: Needs, x: Tensor | None
) -> tuple[Matrix, Matrix, Matrix]:
    """Where dA, dB and dc of segment e go: to its place in a stack, or to its adapter's."""
    number = 0 if len(members) == 1 else e + 1
    own, names, B = grads[number], needs.members[number], members[number].lora_B
    if "lora_A" in names and "lora_A" not in own:
        own["lora_A"] = B.new_empty(B.shape[1], x.shape[1])
    if "lora_B" in names and "lora_B" not in own:
        own["lora_B"] = torch.empty_like(B, memory_format=torch.contiguous_format)
    dc = own.get("bias")
    return _nth(own.get("lora_A"), e), _nth(own.get("lora_B"), e), None if dc is None else _nth(dc.unsqueeze(1), e)


def _nth(t: Tensor | None, e: int) -> Matrix:
    """t[e] of a stack of matrices; t itself, where it is none."""
    if t is None or t.ndim < 3:
        return rows_of(t)
    step, row, _ = t.stride()
    return t.data_ptr() + e * step * t.itemsize, row, NAMES[t.dtype]


def _adjacent(members: Members) -> Members:
    """With A and B whose rows' elements are adjacent."""
    return tuple([LoRAWeights(W, adjacent(A), adjacent(B), c, s) for W, A, B, c, s, _ in members])


def _address(order: Tensor | None) -> int:
    return 0 if order is None else order.data_ptr()
