"""Equations 1 to 6 (reference/linear.py) in chunks of rows: what they need of a chunk is read once and stays in cache.

In 2 and 4 the low-rank term is written first and the base product is added to it in place, so that the low-rank term is
rounded once. x is never copied whole. The factor 1 / (1 - p̂) of dropout is applied on the R-wide side.
"""

import functools
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import cpu_extension
from ...mask import keep_scale, row_chunks
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs
from .. import magnitude
from ..products import columns_together, product_dtype, transposed_product
from . import whole
from .engine import (
    ChunkMask,
    add_backward_product,
    add_forward_product,
    members_backward,
    part,
    sum_dtype,
    to,
    total,
    work_dtype,
)
from .magnitude import STEPS

FIELDS = frozenset({"weight", "lora_A", "lora_B", "bias", "scaling", "magnitude"})


def plan(call: Call) -> Plan:
    """PyTorch computes with any tensors that pass the checks."""
    why = "the first that can compute this call"
    way = way_of(call)
    functions = way.forward, way.backward
    return Plan("torch", why, *(magnitude.around(functions, STEPS) if "magnitude" in call.fields else functions))


def way_of(call: Call) -> ModuleType:
    """The module that computes a call's layers: whole, or this one, in chunks."""
    return whole if whole.fits(call) else sys.modules[__name__]


def notes(device: torch.device) -> list[str]:
    """What is missing here that would make it faster."""
    slow = device.type == "cpu" and cpu_extension.extension is None
    return [f"dropout masks and 4-bit weights by PyTorch operations: {cpu_extension.why_not}"] if slow else []


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None, mask: type[ChunkMask] = ChunkMask, first: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: every member's y[M,N] in x's dtype, and its h[M,R] in A's.

    mask: who makes dropout's; first: its row of x's first one.
    """
    pairs = [_forward_of(x, member, dropout, i, mask, first) for i, member in enumerate(members)]
    return tuple([y for y, _ in pairs]), tuple([h for _, h in pairs])


def _forward_of(
    x: Tensor, member: LoRAWeights, dropout: Dropout | None, number: int, mask: type[ChunkMask], first: int
) -> tuple[Tensor, Tensor | None]:
    """(y, h) of one member."""
    W, A, B, c, s, _ = member
    (M, K), N = x.shape, W.shape[0]
    if A is None or B is None:
        y = x.new_empty(M, N, dtype=sum_dtype(x, W))
        return to(add_forward_product(y.zero_() if c is None else y.copy_(c), x, W), x.dtype), None  # 2
    work = work_dtype(x, A)
    Aw, Bw, cw = to(A, work), to(B, work), None if c is None else to(c, work)
    keep = None if dropout is None else mask(K, dropout, number, work)
    chunks = row_chunks(M, max(K, N), x.device)

    def low_rank(rows: slice) -> tuple[Tensor, Tensor]:
        xw = to(part(x, rows, chunks), work)
        if keep is None or dropout is None:
            h = F.linear(xw, Aw)  # 1
        else:
            keep.chunk(slice(first + rows.start, first + rows.stop))
            h = F.linear(keep.dropped(xw), Aw).mul_(keep_scale(dropout.p))  # 1
        h = to(h, A.dtype)
        return h, F.linear(to(h, work) * s, Bw, cw)

    if len(chunks) == 1:
        h, y = low_rank(chunks[0])
        y = to(y, sum_dtype(x, W))
    else:
        y, h = x.new_empty(M, N, dtype=sum_dtype(x, W)), A.new_empty(M, A.shape[0])
        for rows in chunks:
            h[rows], y[rows] = low_rank(rows)
    return to(add_forward_product(y, x, W), x.dtype), h  # 2


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
    mask: type[ChunkMask] = ChunkMask,
) -> Grads:
    """Equations 3 to 6, as engine.members_backward.

    What no wanted gradient reads may be None: dx reads W, A and B; dA reads x and B; dB reads h. dx has dy's dtype, dA and dB
    have the adapter's, dc is in float32 or wider.
    """
    first = next(dy for dy in dys if dy is not None)
    # 16-bit sums of several members' parts would be rounded once for each
    alone = len(members) == 1
    dx_dtype = sum_dtype(first, members[0].weight) if alone else product_dtype(first.dtype, first.device)
    backward_of = functools.partial(_backward_of, dropout=dropout, mask=mask, dx_dtype=dx_dtype)
    dx, found = members_backward(dys, x, members, hs, needs, backward_of)
    return Grads(None if dx is None else to(dx, first.dtype), found)


def _backward_of(
    dy: Tensor,
    x: Tensor | None,
    member: LoRAWeights,
    h: Tensor | None,
    dx: Tensor | None,
    need_x: bool,
    wanted: tuple[str, ...],
    number: int,
    dropout: Dropout | None,
    mask: type[ChunkMask],
    dx_dtype: torch.dtype,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(dx with one member's part, its wanted gradients but W's); dx is summed up in dx_dtype."""
    W, A, B, _, s, _ = member
    (M, N), work = dy.shape, work_dtype(dy, B, h)
    need_A, low_rank_x = "lora_A" in wanted, need_x and A is not None
    Aw = to(A, work) if low_rank_x else None
    Bw = columns_together(to(B, work), dy) if low_rank_x or need_A else None
    K = W.shape[1] if need_x else x.shape[1] if need_A else 0
    keep = mask(K, dropout, number, work) if dropout is not None and (low_rank_x or need_A) else None
    factor = s if dropout is None else s * keep_scale(dropout.p)  # the factors that 4 and 5 share, by way of 3
    chunks = row_chunks(M, max(K, N), dy.device)
    dA = dB = dc = None
    first = dx is None
    if dx is None and need_x and (len(chunks) > 1 or A is None):
        dx = dy.new_zeros(M, K, dtype=dx_dtype) if A is None else dy.new_empty(M, K, dtype=dx_dtype)
    for rows in chunks:
        dyw = to(part(dy, rows, chunks), work)
        if "lora_B" in wanted:
            dB = total(dB, transposed_product(dyw, to(part(h, rows, chunks), work) * s))  # 6
        if "bias" in wanted:
            dc = total(dc, dyw.sum(0, dtype=torch.promote_types(work, torch.float32)))  # 6
        if not (low_rank_x or need_A):
            continue
        g = (dyw @ Bw).mul_(factor)  # 3
        if keep is not None:
            keep.chunk(rows)
        if low_rank_x:
            dx_rows = g @ Aw
            if keep is not None:
                keep.undrop_(dx_rows)
            if dx is None:
                dx = to(dx_rows, dx_dtype)
            elif first:
                dx[rows] = dx_rows
            else:
                dx[rows] += dx_rows
        if need_A:
            xw = to(part(x, rows, chunks), work)
            dA = total(dA, g.T @ (xw if keep is None else keep.dropped(xw)))  # 5
    if need_x:
        dx = add_backward_product(dx, dy, W)  # 4
    found = {
        "lora_A": None if dA is None else to(dA, B.dtype),
        "lora_B": None if dB is None else to(dB, h.dtype).contiguous(),
        "bias": dc,
    }
    return dx, {field: grad for field, grad in found.items() if grad is not None}
