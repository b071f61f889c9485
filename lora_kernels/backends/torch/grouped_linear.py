"""Equations 14 and 15 (reference/grouped_linear.py) a segment at a time, and of that a chunk of rows.

As in linear.py, a low-rank term is written first and the base product is added to it in place: for all rows at once over a
shared weight, for those of each segment over its own. No weight is summed with B·A, and no rows are padded. The loop needs the
segments' sizes, which the host knows of ids from a CPU; of others it reads them, once a pass.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import keep_scale, row_chunks
from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, Rows
from ..products import columns_together, transposed_product, weight_gradient
from . import linear
from .engine import ChunkMask, add_backward_product, add_forward_product, sum_dtype, to, total, work_dtype
from .nf4 import block_absmax

FIELDS = linear.FIELDS - {"magnitude"}
notes = linear.notes
Members = tuple[LoRAWeights, ...]


def plan(call: Call) -> Plan:
    """PyTorch computes with any tensors that pass the checks."""
    return Plan("torch", "the first that can compute this call", forward, backward)


class Segment(NamedTuple):
    """A segment with rows: its number, its place among the sorted rows, its own projection, whose weight is None if shared."""

    number: int
    place: slice
    own: LoRAWeights
    dropout: Dropout | None

    def chunks(self, width: int, device: torch.device) -> list[slice]:
        """Its place in pieces that stay in a CPU's cache."""
        start = self.place.start
        pieces = row_chunks(self.place.stop - start, width, device)
        return [slice(start + rows.start, start + rows.stop) for rows in pieces]


def ends(rows: Rows, M: int) -> list[int]:
    """The offsets as numbers. On the meta device, which has none, all M rows are in segment 0: shapes depend on no number."""
    if rows.offsets.is_meta:
        return [0, *[M] * (len(rows.offsets) - 1)]
    return (rows.offsets if rows.host is None else rows.host).tolist()


def segments(members: Members, dropout: Dropout | None, bounds: list[int], ps: tuple[float, ...]) -> Iterator[Segment]:
    """Those with rows; of a stack a view of what is theirs."""
    W, A, B, c, s, _ = members[0]
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if start == stop:
            continue
        if len(members) > 1:
            own = members[e + 1]._replace(bias=c)  # in a forward pass
        else:
            weight = weight_of(W, e) if W is not None and len(W.shape) == 3 else None
            bias = c if c is None or c.ndim == 1 else c[e]
            own = LoRAWeights(weight, None if A is None else A[e], None if B is None else B[e], bias, s)
        p = 0.0 if dropout is None else ps[e] if ps else dropout.p
        yield Segment(e, slice(start, stop), own, dropout._replace(p=p) if p else None)


def weight_of(W: Tensor | NF4Weight, e: int) -> Tensor | NF4Weight:
    """W[e]; of a 4-bit stack the segment's codes, and its blocks' absmax in float32: 6 % of what its values take."""
    if isinstance(W, Tensor):
        return W[e]
    size, shape = W.shape[1:].numel(), W.shape[1:]
    absmax = block_absmax(W, e * size // W.blocksize, (e + 1) * size // W.blocksize)
    codes = W.codes[e * size // 2 : (e + 1) * size // 2]
    return NF4Weight(codes, absmax, None, None, None, shape, W.dtype, W.blocksize, W.quant_type)


def numbers(order: Tensor | None, place: slice) -> slice | Tensor:
    """Which rows of x stand there."""
    return place if order is None else order[place]


def forward(
    x: Tensor, members: Members, dropout: Dropout | None, rows: Rows, ps: tuple[float, ...]
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """((y[M, N] in x's dtype,), (h[M, the largest R] in the adapters',))."""
    W, c, M = members[0].weight, members[0].bias, len(x)
    bounds, shared = ends(rows, M), len(W.shape) == 2
    y = x.new_empty(M, W.shape[-2], dtype=sum_dtype(x, W))
    ranks = [member.lora_A.shape[-2] for member in members if member.lora_A is not None]
    h = members[-1].lora_A.new_zeros(M, max(ranks))
    for segment in segments(members, dropout, bounds, ps):
        low_rank(y, h, x, rows.order, segment)
        if not shared:
            add_forward_product(y[segment.place], x[segment.place], segment.own.weight)
    if bounds[-1] < M:
        y[numbers(rows.order, slice(bounds[-1], M))] = 0 if c is None or c.ndim == 2 else to(c, y.dtype)
    if shared:
        y = add_forward_product(y, x, W)
    return (to(y, x.dtype),), (h,)


def low_rank(y: Tensor, h: Tensor, x: Tensor, order: Tensor | None, segment: Segment) -> None:
    """Write s·h·Bᵀ + c to a segment's rows of y, and h to its place."""
    _, A, B, c, s, _ = segment.own
    work, dropout = work_dtype(x, A), segment.dropout
    Aw, Bw, cw = to(A, work), to(B, work), None if c is None else to(c, work)
    keep = None if dropout is None else ChunkMask(x.shape[1], dropout, 0, work)
    for place in segment.chunks(max(x.shape[1], y.shape[1]), x.device):
        i = numbers(order, place)
        xw = to(x[i], work)
        if keep is None:
            h_rows = F.linear(xw, Aw)  # 1
        else:
            keep.chunk(i)
            h_rows = F.linear(keep.dropped(xw), Aw).mul_(keep_scale(dropout.p))  # 1
        h_rows = to(h_rows, A.dtype)
        h[place, : len(A)] = h_rows
        y[i] = to(F.linear(to(h_rows, work) * s, Bw, cw), y.dtype)  # 2


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
    """Equation 15. dx has dy's dtype, dA and dB the adapters', dc is in float32 or wider; see functional/grouped_linear.py."""
    (dy,), (h,), W, M = dys, saved, members[0].weight, len(dys[0])
    bounds, own_weight = ends(rows, M), W is not None and len(W.shape) == 3
    dx = dy.new_empty(M, W.shape[-1], dtype=sum_dtype(dy, W)) if needs.x else None
    found = begun(dy, x, members, needs, rows)
    for segment in segments(members, dropout, bounds, ps):
        wanted = tuple(found[0]) if len(members) == 1 else needs.members[segment.number + 1]
        grads = backward_of(dx, dy, x, h, rows.order, segment, wanted)
        if needs.x and own_weight:
            add_backward_product(dx[segment.place], dy[segment.place], segment.own.weight)  # 4
        if "weight" in wanted:
            grads["weight"] = weight_gradient(dy[segment.place], x[segment.place])
        into(found, grads, members, segment)
    if needs.x:
        dx[numbers(rows.order, slice(bounds[-1], M))] = 0
        dx = to(dx if own_weight else add_backward_product(dx, dy, W), dy.dtype)  # 4
    if "weight" in needs.members[0] and not own_weight:
        found[0]["weight"] = weight_gradient(dy, x)
    if "bias" in needs.members[0] and members[0].bias.ndim == 1:
        found[0]["bias"] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return Grads(dx, tuple(found))


def begun(dy: Tensor, x: Tensor | None, members: Members, needs: Needs, rows: Rows) -> list[dict[str, Tensor]]:
    """Zeros for the gradients of stacks, which segments without rows keep; and of a list, where the host does not know them."""
    found: list[dict[str, Tensor]] = [{} for _ in members]
    for gradients, member, names in zip(found, members, needs.members, strict=True):
        if "lora_A" in names and (len(members) == 1 or rows.host is None):
            gradients["lora_A"] = member.lora_B.new_zeros(*member.lora_B.shape[:-2], member.lora_B.shape[-1], x.shape[1])
        if "lora_B" in names and (len(members) == 1 or rows.host is None):
            gradients["lora_B"] = torch.zeros_like(member.lora_B, memory_format=torch.contiguous_format)
        if "weight" in names and member.weight.ndim == 3:
            gradients["weight"] = dy.new_zeros(member.weight.shape)
        if "bias" in names and member.bias.ndim == 2:
            gradients["bias"] = dy.new_zeros(member.bias.shape, dtype=torch.promote_types(dy.dtype, torch.float32))
    return found


def into(found: list[dict[str, Tensor]], grads: dict[str, Tensor], members: Members, segment: Segment) -> None:
    """A segment's gradients where they belong: in its part of a stack, or in its adapter's."""
    own = found[0 if len(members) == 1 else segment.number + 1]
    for name, grad in grads.items():
        if len(members) == 1:
            own[name][segment.number] = grad
        else:
            own[name] = to(grad, segment.own.lora_B.dtype).contiguous()


def backward_of(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    order: Tensor | None,
    segment: Segment,
    wanted: tuple[str, ...],
) -> dict[str, Tensor]:
    """The wanted gradients of a segment's A, B and own bias; its rows of dx, if that is wanted, get their low-rank term."""
    (_, A, B, _, s, _), dropout, N = segment.own, segment.dropout, dy.shape[1]
    need_A, own_bias = "lora_A" in wanted, "bias" in wanted
    work = work_dtype(dy, *(t for t in (B, h) if t is not None))
    Aw = None if dx is None else to(A, work)
    Bw = columns_together(to(B, work), dy) if dx is not None or need_A else None
    K = 0 if dx is None and x is None else (x if dx is None else dx).shape[1]
    keep = ChunkMask(K, dropout, 0, work) if dropout is not None and Bw is not None else None
    factor = s if dropout is None else s * keep_scale(dropout.p)  # what 4 and 5 share, by way of 3
    dA = dB = dc = None
    for place in segment.chunks(max(K, N), dy.device):
        i = numbers(order, place)
        dyw = to(dy[i], work)
        if "lora_B" in wanted:
            dB = total(dB, transposed_product(dyw, to(h[place, : B.shape[1]], work) * s))  # 6
        if own_bias:
            dc = total(dc, dyw.sum(0, dtype=torch.promote_types(work, torch.float32)))  # 6
        if Bw is None:
            continue
        g = (dyw @ Bw).mul_(factor)  # 3
        if keep is not None:
            keep.chunk(i)
        if dx is not None:
            dx_rows = g @ Aw
            if keep is not None:
                keep.undrop_(dx_rows)
            dx[i] = to(dx_rows, dx.dtype)
        if need_A:
            xw = to(x[i], work)
            dA = total(dA, g.T @ (xw if keep is None else keep.dropped(xw)))  # 5
    found = {"lora_A": dA, "lora_B": dB, "bias": dc}
    return {name: grad for name, grad in found.items() if grad is not None}
