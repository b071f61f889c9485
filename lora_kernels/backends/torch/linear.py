"""Equations 1 to 6 (reference/linear.py) in chunks of rows: what they need of a chunk is read once and stays in cache.

In 2 and 4 the low-rank term is written first and the base product is added to it in place, so that the low-rank term is
rounded once. x is never copied whole. The factor 1 / (1 - p̂) of dropout is applied on the R-wide side.
"""

import torch
from torch import Tensor

from ... import cpu_extension
from ...mask import keep_scale, row_chunks
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs
from ..products import set_product, weight_gradient
from .engine import ChunkMask, add_backward_product, add_forward_product, sum_dtype, total, work_dtype

FIELDS = frozenset({"weight", "lora_A", "lora_B", "bias", "scaling"})


def plan(call: Call) -> Plan:
    """PyTorch computes with any tensors that pass the checks."""
    return Plan("torch", "the first that can compute this call", forward, backward)


def notes(device: torch.device) -> list[str]:
    """What is missing here that would make it faster."""
    slow = device.type == "cpu" and cpu_extension.extension is None
    return [f"dropout masks and 4-bit weights by PyTorch operations: {cpu_extension.why_not}"] if slow else []


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None, mask: type[ChunkMask] = ChunkMask
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Equations 1 and 2: every member's y[M,N] in x's dtype, and its h[M,R] in A's. mask: who makes dropout's."""
    pairs = [_forward_of(x, member, dropout, i, mask) for i, member in enumerate(members)]
    return tuple([y for y, _ in pairs]), tuple([h for _, h in pairs])


def _forward_of(
    x: Tensor, member: LoRAWeights, dropout: Dropout | None, number: int, mask: type[ChunkMask]
) -> tuple[Tensor, Tensor]:
    """(y, h) of one member."""
    W, A, B, c, s = member
    (M, K), N, work = x.shape, B.shape[0], work_dtype(x, A)
    y, h = x.new_empty(M, N, dtype=sum_dtype(x, W)), A.new_empty(M, A.shape[0])
    Aw, Bw, cw = A.to(work), B.to(work), None if c is None else c.to(work)
    keep = None if dropout is None else mask(K, dropout, number, work)
    for rows in row_chunks(M, max(K, N), x.device):
        xw = x[rows].to(work)
        if keep is None or dropout is None:
            h[rows] = xw @ Aw.T  # 1
        else:
            keep.chunk(rows)
            h[rows] = (keep.dropped(xw) @ Aw.T).mul_(keep_scale(dropout.p))  # 1
        set_product(y[rows], h[rows].to(work) * s, Bw.T, cw)
    del xw  # the product needs that memory
    return add_forward_product(y, x, W).to(x.dtype), h  # 2


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
    mask: type[ChunkMask] = ChunkMask,
) -> Grads:
    """Equations 3 to 6. A member whose y was not used, with None for its dy, gets no gradients and adds nothing to dx.

    What no wanted gradient reads may be None: dx reads W, A and B; dA reads x and B; dB reads h. dx has dy's dtype, dA and dB
    have the adapter's, dc is in float32 or wider.
    """
    dx: Tensor | None = None
    grads: list[dict[str, Tensor]] = []
    for i, (dy, member, h, wanted) in enumerate(zip(dys, members, hs, needs.members, strict=True)):
        if dy is None:
            grads.append({})
            continue
        part, found = _backward_of(dy, x, member, h, dropout, needs.x, wanted, i, mask)
        dx = part if dx is None else dx.add_(part)
        if "weight" in wanted:
            found["weight"] = weight_gradient(dy, x)
        grads.append(found)
    return Grads(dx, tuple(grads))


def _backward_of(
    dy: Tensor,
    x: Tensor | None,
    member: LoRAWeights,
    h: Tensor | None,
    dropout: Dropout | None,
    need_x: bool,
    wanted: tuple[str, ...],
    number: int,
    mask: type[ChunkMask],
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(one member's part of dx, its wanted gradients but W's)."""
    W, A, B, _, s = member
    (M, N), work = dy.shape, work_dtype(dy, B, h)
    need_A = "lora_A" in wanted
    Aw = A.to(work) if need_x else None
    Bw = B.to(work).T.contiguous().T if need_x or need_A else None  # dy·B is twice as fast with B's columns contiguous
    K = W.shape[1] if need_x else x.shape[1] if need_A else 0
    keep = mask(K, dropout, number, work) if dropout is not None and (need_x or need_A) else None
    factor = s if dropout is None else s * keep_scale(dropout.p)  # the factors that 4 and 5 share, by way of 3
    dx = dy.new_empty(M, K, dtype=sum_dtype(dy, W)) if need_x else None
    dA = dB = dc = None
    for rows in row_chunks(M, max(K, N), dy.device):
        dyw = dy[rows].to(work)
        if "lora_B" in wanted:
            dB = total(dB, ((h[rows].to(work) * s).T @ dyw).T)  # 6
        if "bias" in wanted:
            dc = total(dc, dyw.sum(0, dtype=torch.promote_types(work, torch.float32)))  # 6
        if not (need_x or need_A):
            continue
        g = (dyw @ Bw) * factor  # 3
        if keep is not None:
            keep.chunk(rows)
        if need_x:
            set_product(dx[rows], g, Aw)
            if keep is not None:
                keep.undrop_(dx[rows])
        if need_A:
            xw = x[rows].to(work)
            dA = total(dA, g.T @ (xw if keep is None else keep.dropped(xw)))  # 5
    del dyw  # the product needs that memory
    if need_x:
        dx = add_backward_product(dx, dy, W).to(dy.dtype)  # 4
    found = {
        "lora_A": None if dA is None else dA.to(B.dtype),
        "lora_B": None if dB is None else dB.to(h.dtype).contiguous(),
        "bias": dc,
    }
    return dx, {field: grad for field, grad in found.items() if grad is not None}
