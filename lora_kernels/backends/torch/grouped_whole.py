"""Equations 14 and 15 (reference/grouped_linear.py) over many small segments: one grouped product for all of them.

A segment costs the loop of grouped_linear.py ten operations each way, 60 µs of a CPU's thread, where its products take less.
grouped_mm has that loop in C++. It writes fresh memory, so that y and dx are written twice: worth it only where rows are few.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import keep_scale
from ...values import Dropout, LoRAWeights, Rows
from .engine import ChunkMask

FEW = 64  # rows a segment on average


def fits(v: Tensor, member: LoRAWeights, rows: Rows) -> bool:
    """Whether these are rows in float32 on a CPU, sorted by segment, few in each, over stacks without biases, as grouped_mm
    takes them: rows and matrices of whole 16 bytes.
    """
    W, A, B, c, _, _ = member
    if v.device.type != "cpu" or rows.order is not None or c is not None or not hasattr(F, "grouped_mm"):
        return False
    if not isinstance(W, Tensor) or W.ndim != 3 or W.shape[1] % 4 or not 0 < len(v) <= FEW * len(W):
        return False
    return all(t is None or (t.dtype == torch.float32 and _aligned(t)) for t in (v, W, A, B))


def _aligned(t: Tensor) -> bool:
    strides = sorted(t.stride())
    return strides[0] == 1 and all(stride % 4 == 0 for stride in strides[1:]) and t.data_ptr() % 16 == 0


def forward(x: Tensor, member: LoRAWeights, dropout: Dropout | None, rows: Rows) -> tuple[Tensor, Tensor]:
    """(y[M, N], h[M, R]); zeros for rows of no segment."""
    W, A, B, _, s, _ = member
    offs, keep = rows.offsets[1:], _mask(len(x), x.shape[1], dropout)
    h = F.grouped_mm(x if keep is None else keep.dropped(x), A.mT, offs=offs)  # 1
    if dropout is not None:
        h *= keep_scale(dropout.p)
    y = F.grouped_mm(h * s, B.mT, offs=offs).add_(F.grouped_mm(x, W.mT, offs=offs))  # 2
    return _without_rest(y, rows), _without_rest(h, rows)


def backward(
    dy: Tensor, x: Tensor | None, member: LoRAWeights, h: Tensor | None, dropout: Dropout | None, wanted: set[str], rows: Rows
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """dx and the gradients of A and B, of those in `wanted`; h is none but for B's."""
    W, A, B, _, s, _ = member
    offs, dx, grads = rows.offsets[1:], None, {}
    if wanted & {"x", "lora_A"}:
        g = F.grouped_mm(dy, B, offs=offs).mul_(s * keep_scale(dropout.p) if dropout else s)  # 3
        keep = _mask(len(dy), (A if x is None else x).shape[-1], dropout)
        if "x" in wanted:
            dx = F.grouped_mm(g, A, offs=offs)
            if keep is not None:
                keep.undrop_(dx)
            dx = _without_rest(dx.add_(F.grouped_mm(dy, W, offs=offs)), rows)  # 4
        if "lora_A" in wanted:
            assert x is not None
            grads["lora_A"] = F.grouped_mm(g.T, x if keep is None else keep.dropped(x), offs=offs)  # 5
    if "lora_B" in wanted:
        assert h is not None
        grads["lora_B"] = F.grouped_mm(dy.T, h * s, offs=offs)  # 6
    return dx, grads


def _mask(M: int, K: int, dropout: Dropout | None) -> ChunkMask | None:
    if dropout is None:
        return None
    keep = ChunkMask(K, dropout, 0, torch.float32)
    keep.chunk(slice(0, M))
    return keep


def _without_rest(v: Tensor, rows: Rows) -> Tensor:
    """v with zeros in the rows of no segment, which grouped_mm does not write."""
    v[int((rows.offsets if rows.host is None else rows.host)[-1]) :] = 0
    return v
