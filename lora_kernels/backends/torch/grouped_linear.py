"""Equations 14 and 15 (reference/grouped_linear.py), a block of sorted rows at a time, and of that a segment.

As in linear.py, a low-rank term is written first and the base product is added to it in place: for all rows at once over a
shared weight, for those of each segment over its own. No weight is summed with B·A, and no rows are padded. The loop needs the
segments' sizes, which the host knows of ids from a CPU; of others it reads them, once a pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import keep_scale, row_chunks
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, Rows
from ..products import columns_together, transposed_product, weight_gradient
from . import linear
from .engine import ChunkMask, add_backward_product, add_forward_product, sum_dtype, to, total, work_dtype
from .segments import Block, Members, Piece, Segment, blocks, ends, numbers, places, segments

FIELDS = linear.FIELDS - {"magnitude"}
notes = linear.notes


def plan(call: Call) -> Plan:
    """PyTorch computes with any tensors that pass the checks."""
    return Plan("torch", "the first that can compute this call", forward, backward)


def forward(
    x: Tensor, members: Members, dropout: Dropout | None, rows: Rows, ps: tuple[float, ...]
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """((y[M, N] in x's dtype,), (h[M, the largest R] in the adapters',))."""
    (M, K), W, c = x.shape, members[0].weight, members[0].bias
    bounds, shared = ends(rows, M), len(W.shape) == 2
    y = x.new_empty(M, W.shape[-2], dtype=sum_dtype(x, W))
    ranks = [member.lora_A.shape[-2] for member in members if member.lora_A is not None]
    h = members[-1].lora_A.new_zeros(M, max(ranks))
    found = list(segments(members, dropout.p if dropout else 0.0, ps, bounds))
    for block in blocks(found, row_chunks(M, max(K, y.shape[1]), x.device)[0].stop):
        low_rank(y, h, x, rows.order, block, dropout)
    for segment in () if shared else found:
        add_forward_product(y[segment.place], x[segment.place], segment.own.weight)  # 2
    if bounds[-1] < M:
        y[numbers(rows.order, slice(bounds[-1], M))] = 0 if c is None or c.ndim == 2 else to(c, y.dtype)
    return (to(add_forward_product(y, x, W) if shared else y, x.dtype),), (h,)


def low_rank(y: Tensor, h: Tensor, x: Tensor, order: Tensor | None, block: Block, dropout: Dropout | None) -> None:
    """Write s·h·Bᵀ + c to the block's rows of y, and h to its place."""
    work, i = work_dtype(x, h), numbers(order, block.place)
    xw = to(x[i], work)
    if block.p:
        keep = mask_of(dropout, block, x.shape[1], work, i)
        xw = keep.dropped(xw)
    in_place = order is None and y.dtype == work
    low = y[i] if in_place else y.new_empty(len(xw), y.shape[1], dtype=work)
    for segment, place, within in block.pieces:
        _, A, B, c, s, _ = segment.own
        h_rows = F.linear(xw[within], to(A, work))  # 1
        h_rows = to(h_rows.mul_(keep_scale(block.p)) if block.p else h_rows, A.dtype)
        h[place, : A.shape[0]] = h_rows
        scaled, Bt = to(h_rows, work) * s, to(B, work).T
        if c is None:
            torch.mm(scaled, Bt, out=low[within])  # 2
        else:
            torch.addmm(to(c, work), scaled, Bt, out=low[within])  # 2
    if not in_place:
        y[i] = to(low, y.dtype)


def mask_of(dropout: Dropout, block: Block, K: int, work: torch.dtype, i: slice | Tensor) -> ChunkMask:
    """The mask of a block, of the rows i of x."""
    keep = ChunkMask(K, dropout._replace(p=block.p), 0, work)
    keep.chunk(i)
    return keep


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
    grads = begun(dy, x, members, needs, rows)
    found = list(segments(members, dropout.p if dropout else 0.0, ps, bounds))
    of_adapters(grads, dx, dy, x, h, found, members, dropout, needs, rows.order)
    for segment in found if needs.x and own_weight else ():
        add_backward_product(dx[segment.place], dy[segment.place], segment.own.weight)  # 4
    if needs.x:
        dx[numbers(rows.order, slice(bounds[-1], M))] = 0
        dx = to(dx if own_weight else add_backward_product(dx, dy, W), dy.dtype)  # 4
    of_base(grads[0], dy, x, members[0], needs.members[0], bounds)
    return Grads(dx, tuple(grads))


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


def of_base(
    grads: dict[str, Tensor], dy: Tensor, x: Tensor | None, member: LoRAWeights, names: tuple[str, ...], bounds: list[int]
) -> None:
    """Fill in the gradients of the weight, and of a bias that is shared."""
    if "weight" in names and "weight" not in grads:
        grads["weight"] = weight_gradient(dy, x)
    elif "weight" in names:
        for e, place in places(bounds):
            grads["weight"][e] = weight_gradient(dy[place], x[place])
    if "bias" in names and "bias" not in grads:
        grads["bias"] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def of_adapters(
    grads: list[dict[str, Tensor]],
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    found: list[Segment],
    members: Members,
    dropout: Dropout | None,
    needs: Needs,
    order: Tensor | None,
) -> None:
    """Fill in the gradients of A, B and biases of segments' own; dx, if it is wanted, gets their low-rank terms."""
    stack = len(members) == 1
    fields = set(grads[0]) - {"weight"} if stack else {name for names in needs.members[1:] for name in names}
    if dx is None and not fields:
        return
    K = 0 if dx is None and x is None else (x if dx is None else dx).shape[1]
    sums: dict[str, Tensor] = {}  # of a segment that goes on in the next block
    for block in blocks(found, row_chunks(len(dy), max(K, dy.shape[1]), dy.device)[0].stop):
        wanted = [fields if stack else set(needs.members[piece.segment.number + 1]) for piece in block.pieces]
        for piece, own in zip(block.pieces, of_block(dx, dy, x, h, order, block, dropout, wanted), strict=True):
            sums = {name: total(sums.get(name), grad) for name, grad in own.items()}
            if piece.place.stop == piece.segment.place.stop:
                into(grads, sums, members, piece.segment)
                sums = {}


def into(found: list[dict[str, Tensor]], grads: dict[str, Tensor], members: Members, segment: Segment) -> None:
    """A segment's gradients where they belong: in its part of a stack, or in its adapter's."""
    own = found[0 if len(members) == 1 else segment.number + 1]
    for name, grad in grads.items():
        if len(members) == 1:
            own[name][segment.number] = grad
        else:
            own[name] = to(grad, segment.own.lora_B.dtype).contiguous()


def of_block(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    order: Tensor | None,
    block: Block,
    dropout: Dropout | None,
    wanted: list[set[str]],
) -> list[dict[str, Tensor]]:
    """The wanted gradients of each piece."""
    i, Bs = numbers(order, block.place), [piece.segment.own.lora_B for piece in block.pieces]
    work = work_dtype(dy, h, next((B for B in Bs if B is not None), None))
    dyw, needs_g = to(dy[i], work), [dx is not None or "lora_A" in names for names in wanted]
    gs = [g_of(dyw, piece, work) if needed else None for piece, needed in zip(block.pieces, needs_g, strict=True)]
    keep = mask_of(dropout, block, (x if dx is None else dx).shape[1], work, i) if block.p and any(needs_g) else None
    if dx is not None:
        in_place = order is None and dx.dtype == work
        dx_rows = dx[i] if in_place else dx.new_empty(len(dyw), dx.shape[1], dtype=work)
        for g, piece in zip(gs, block.pieces, strict=True):
            torch.mm(g, to(piece.segment.own.lora_A, work), out=dx_rows[piece.within])
        if keep is not None:
            keep.undrop_(dx_rows)
        if not in_place:
            dx[i] = to(dx_rows, dx.dtype)
    if any("lora_A" in names for names in wanted):
        xw = to(x[i], work) if keep is None else keep.dropped(to(x[i], work))
    found: list[dict[str, Tensor]] = []
    for g, names, (segment, place, within) in zip(gs, wanted, block.pieces, strict=True):
        own = {}
        if "lora_A" in names:
            own["lora_A"] = g.T @ xw[within]  # 5
        if "lora_B" in names:
            h_rows = to(h[place, : segment.own.lora_B.shape[1]], work) * segment.own.scaling
            own["lora_B"] = transposed_product(dyw[within], h_rows)  # 6
        if "bias" in names:
            own["bias"] = dyw[within].sum(0, dtype=torch.promote_types(work, torch.float32))  # 6
        found.append(own)
    return found


def g_of(dyw: Tensor, piece: Piece, work: torch.dtype) -> Tensor:
    """g of a piece's rows, with dropout's scale, which 4 and 5 share."""
    dy, (_, _, B, _, s, _), p = dyw[piece.within], piece.segment.own, piece.segment.p
    return (dy @ columns_together(to(B, work), dy)).mul_(s * keep_scale(p) if p else s)  # 3
