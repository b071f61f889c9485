"""Equations 11 to 13 (reference/magnitude.py) by PyTorch operations, in chunks that stay in a CPU's cache.

The sum of W + s·B·A is taken directly, a tile of rows at a time: of 2048 x 2048 with R = 16 it costs 4.0 ms on one thread of a
CPU where 2s·Σ (W·Aᵀ) ⊙ B + s²·Σ (B·(A·Aᵀ)) ⊙ B over a kept ‖W‖² costs 3.6 (float32; bfloat16 4.4 and 3.4), reads W once like
that one, and has no difference of large numbers, nor anything kept that another weight would make wrong.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...dtypes import wide_dtype
from ...mask import row_chunks
from ...nf4 import NF4Weight
from ...reference.magnitude import over
from ...scratch import slices
from ..magnitude import Steps
from .engine import part, to, total
from .nf4 import tiles

TILE = 1 << 18  # elements of W + s·B·A at a time


def why_not(t: Tensor) -> None:
    """None: PyTorch takes any tensor."""


def norm(W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Equation 11: n[N] = ‖W + s·B·A‖ by rows, over W as `dtype`."""
    wide = wide_dtype(dtype, A.dtype)
    A, B, alpha = to(A, wide), to(B, wide), s if isinstance(s, float) else 1.0
    B = B if isinstance(s, float) else s * B
    found = [
        torch.linalg.vector_norm(torch.addmm(tile, B if len(tile) == len(B) else B[rows], A, alpha=alpha), dim=1)
        for rows, tile in _tiles(W, dtype, wide)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _tiles(W: Tensor | NF4Weight, dtype: torch.dtype, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W[rows] in `wide`), each until the next one."""
    if isinstance(W, NF4Weight):
        yield from tiles(W, dtype, wide)
        return
    N, K = W.shape
    chunks = slices(N, max(1, TILE // max(1, K)) if W.device.type == "cpu" else max(1, N))
    for rows in chunks:
        yield rows, to(part(W, rows, chunks), wide)


def scale(v: Tensor, m: Tensor, n: Tensor, c: Tensor | None) -> Tensor:
    """Equation 12: y = u ⊙ v + c in v's dtype."""
    u = over(m, n)
    if v.dtype == u.dtype:
        return v * u if c is None else torch.addcmul(c, v, u)
    y = torch.empty_like(v)
    for rows in row_chunks(len(v), v.shape[1], v.device):
        wide = v[rows] * u
        y[rows] = wide if c is None else wide.add_(c)
    return y


def scale_backward(
    dy: Tensor, v: Tensor | None, m: Tensor, n: Tensor | None, need_v: bool, need_m: bool, need_c: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Equation 13: (dv in dy's dtype, dm, dc), those that are needed."""
    u = over(m, n) if need_v else None
    dv = dm = dc = None
    work = wide_dtype(dy.dtype) if n is None else n.dtype
    chunks = row_chunks(len(dy), dy.shape[1], dy.device)
    if need_v and (len(chunks) > 1 or work != dy.dtype):
        dv = torch.empty_like(dy, memory_format=torch.contiguous_format)
    for rows in chunks:
        wide = to(part(dy, rows, chunks), work)
        if need_m:
            dm = total(dm, (wide * part(v, rows, chunks)).sum(0))
        if need_c:
            dc = total(dc, wide.sum(0))
        if dv is not None:
            torch.mul(wide, u, out=dv[rows])
        elif need_v:
            dv = wide * u
    return dv, None if dm is None else over(dm, n), dc


STEPS = Steps(norm, scale, scale_backward)
