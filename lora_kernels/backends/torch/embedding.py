"""Equations 23 to 26 (reference/embedding.py) without a temporary of A's size, or of y's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine import add_low_rank, work_dtype


def forward(ids: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """Equations 23 and 24: y[M, N] for ids[M]."""
    return add_low_rank(F.embedding(ids, W), A.index_select(1, ids).T, B, s)


def backward(
    dy: Tensor,
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    s: float | Tensor,
    padding_idx: int | None,
    rows: int | None,
    needs: tuple[bool, bool],
) -> list[Tensor | None]:
    """Equations 25 and 26: dW, where it has this number of rows, dA and dB where `needs` says so."""
    need_A, need_B = needs
    work = work_dtype(dy, B)
    dW = dA = dB = None
    if rows is not None:
        dW = torch.ops.aten.embedding_dense_backward(dy, ids, rows, -1 if padding_idx is None else padding_idx, False)
    if need_A:
        g = (dy.to(work) @ B.to(work)).mul_(s)  # 25
        if padding_idx is not None:
            g.masked_fill_((ids == padding_idx)[:, None], 0)
        dA = _columns(g, ids, A)
    if need_B:
        h = A.index_select(1, ids).to(work)
        dB = ((h @ dy.to(work)).T * s).to(B.dtype)  # 26
    return [dW, dA, dB]


def _columns(g: Tensor, ids: Tensor, A: Tensor) -> Tensor:
    """dA[R, V], whose column v is Σ g over ids = v; of a 16-bit A summed up in float32, for the columns that are there."""
    R, V = A.shape
    if A.dtype == g.dtype:
        return A.new_zeros(R, V).scatter_add_(1, ids.expand(R, -1), g.T)
    if torch.compiler.is_compiling():  # which columns are there is no constant of a graph
        return g.new_zeros(R, V).scatter_add_(1, ids.expand(R, -1), g.T).to(A.dtype)
    there, place = ids.unique(return_inverse=True)
    sums = g.new_zeros(R, len(there)).scatter_add_(1, place.expand(R, -1), g.T)
    return A.new_zeros(R, V).index_copy_(1, there, sums.to(A.dtype))
