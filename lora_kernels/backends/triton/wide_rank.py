"""The same equations for ranks above MAX_RANK, whose adapters are ordinary matrix products over drop(x): the vendor's.

Rows are taken in chunks, in which x is dropped (and widened, where the adapters are wider): it is never copied whole.
"""

import torch
from torch import Tensor

from ...mask import row_chunks
from ..torch.linear import Needs, add_product, set_product, total, work_dtype
from .blocks import row_major
from .dropout import drop, drops


def lora_forward(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2: y[M,N] in x's dtype, h[M,R] in A's."""
    M, N, x, work = len(x), len(W), row_major(x), work_dtype(x, A)
    y, h = x.new_empty(M, N), A.new_empty(M, len(A))
    Aw, Bw, cw = (None if t is None else t.to(work) for t in (A, B, c))
    for rows in row_chunks(M, max(W.shape), x.device):
        h[rows] = _dropped(x[rows], rows, p, seed, work) @ Aw.T  # 1
        set_product(y[rows], h[rows].to(work) * s, Bw.T, cw)
    return add_product(y, x, W.T), h  # 2


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    h: Tensor | None,
    s: float | Tensor,
    p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 3 to 6, as reference.lora_backward; dc is in float32."""
    (M, N), work = dy.shape, work_dtype(*(t for t in (dy, B, h) if t is not None))
    K = W.shape[1] if needs.dx else x.shape[1] if needs.dA else 0
    x = row_major(x) if needs.dA else None
    Aw, Bw = (None if t is None else t.to(work) for t in (A, B))
    dx, dA, dB = dy.new_empty(M, K) if needs.dx else None, None, None
    for rows in row_chunks(M, max(K, N), dy.device):
        dyw = dy[rows].to(work)
        if needs.dB:
            dB = total(dB, dyw.T @ (h[rows].to(work) * s))  # 6
        if needs.dA or needs.dx:
            g = (dyw @ Bw) * s  # 3
        if needs.dA:
            dA = total(dA, g.T @ _dropped(x[rows], rows, p, seed, work))  # 5
        if needs.dx:
            dx[rows] = _dropped(g @ Aw, rows, p, seed, dx.dtype)
    if needs.dx:
        add_product(dx, dy, W)  # 4
    dc = dy.sum(0, dtype=torch.float32) if needs.dc else None
    return dx, None if dA is None else dA.to(B.dtype), None if dB is None else dB.to(h.dtype), dc


def _dropped(v: Tensor, rows: slice, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor:
    """drop(v) in `dtype`, for v that holds the mask's rows `rows`."""
    if seed is None or not drops(p):
        return v.to(dtype)
    return drop(v, p, seed, first_row=rows.start, out=torch.empty_like(v, dtype=dtype))
