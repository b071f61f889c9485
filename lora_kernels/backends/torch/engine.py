"""How PyTorch's operations compute a layer: in which dtypes; masks by chunks of rows, 4-bit weights by tiles."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...mask import KeepRows, row_chunks
from ...nf4 import NF4Weight
from ...scratch import slices
from ...values import Dropout, Grads, LoRAWeights, Needs
from ..products import accumulate, add_product, product_dtype, weight_gradient
from . import nf4_product
from .nf4 import column_tiles, tiles

WIDE_ELEMENTS = 5 << 18  # of x or dx that are held in float32 at a time: with tiles and the mask, below 16 MiB


class ChunkMask:
    """keep of one member, chunk by chunk; the scale 1 / (1 - p̂) is the caller's, on the R-wide side."""

    def __init__(self, K: int, dropout: Dropout, member: int, dtype: torch.dtype):
        self._keep = KeepRows(K, dropout.p, dropout.seed, offset=dropout.offset + member, dtype=dtype)

    def chunk(self, rows: slice) -> None:
        """Go to these rows."""
        self._rows = None  # the next mask may have its memory
        self._rows = self._keep(rows)

    def undrop_(self, v: Tensor) -> None:
        """v *= keep, before `dropped`."""
        v.mul_(self._rows)

    def dropped(self, v: Tensor) -> Tensor:
        """v · keep, where the mask was."""
        return self._rows.mul_(v)


def members_backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    needs: Needs,
    backward_of: Callable[..., tuple[Tensor | None, dict[str, Tensor]]],
    *more: Any,
) -> Grads:
    """Equations 3 to 6 of every member, and dx, the sum of their parts in one buffer.

    backward_of(dy, x, member, h, dx, need_x, wanted, number, *more): dx with this member's part, in place unless it is the
    first, with None for dx; and its wanted gradients but W's. A member whose y was not used has None for its dy, and no part.
    """
    dx: Tensor | None = None
    grads: list[dict[str, Tensor]] = []
    for i, (dy, member, h, wanted) in enumerate(zip(dys, members, hs, needs.members, strict=True)):
        if dy is None:
            grads.append({})
            continue
        dx, found = backward_of(dy, x, member, h, dx, needs.x, wanted, i, *more)
        if "weight" in wanted:
            found["weight"] = weight_gradient(dy, x)
        grads.append(found)
    return Grads(dx, tuple(grads))


def total(sum_so_far: Tensor | None, part: Tensor) -> Tensor:
    """The sum over chunks of rows, in float32 or wider."""
    part = part if part.dtype.itemsize >= 4 else part.float()
    return part if sum_so_far is None else sum_so_far.add_(part)


def to(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), which asks PyTorch only where it has to."""
    return t if t.dtype == dtype else t.to(dtype)


def part(t: Tensor, rows: slice, chunks: list[slice]) -> Tensor:
    """t[rows], or t itself where that is all of it."""
    return t if len(chunks) == 1 else t[rows]


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype among the tensors; float32 where that would be a 16-bit type on a CPU.

    A CPU that multiplies bfloat16 would be a sixth faster in it without dropout, but one result in 600 had up to three times
    the error of PyTorch's operations.
    """
    dtypes = {t.dtype for t in tensors if t is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else functools.reduce(torch.promote_types, dtypes)
    narrow = dtype.itemsize < 4 and next(t for t in tensors if t is not None).device.type == "cpu"
    return torch.float32 if narrow else dtype


def add_low_rank(y: Tensor, h: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """y[M, N] += s·h·Bᵀ in place, each element rounded once; computed in the wider dtype, in chunks of rows."""
    work = work_dtype(y, B)
    h, B = h.to(work), B.to(work)
    h, s = (h, s) if isinstance(s, (int, float)) else (h * s, 1.0)
    if work == y.dtype:
        return y.addmm_(h, B.T, alpha=s)
    for rows in row_chunks(len(y), y.shape[1], y.device):
        y[rows].add_(h[rows] @ B.T, alpha=s)
    return y


# ---- the base product, dense or over a 4-bit weight a tile at a time, in memory that the next tile overwrites ----


def add_forward_product(y: Tensor, x: Tensor, W: Tensor | NF4Weight) -> Tensor:
    """y += x·Wᵀ in place."""
    if not isinstance(W, NF4Weight):
        return add_product(y, x, W.T)
    if nf4_product.added(y, x, W):
        return y
    work = product_dtype(x.dtype, x.device)
    for rows in _rows(x, work):
        _add_forward_rows(y[rows], x[rows].to(work), x.dtype, W)
    return y


def _add_forward_rows(y: Tensor, x: Tensor, dtype: torch.dtype, W: NF4Weight) -> None:
    for n, tile in tiles(W, dtype, x.dtype):
        if x.dtype == y.dtype:
            accumulate(y[:, n], x, tile.T)
        else:
            y[:, n] = accumulate(y[:, n].to(x.dtype), x, tile.T)
        del tile


def add_backward_product(dx: Tensor, dy: Tensor, W: Tensor | NF4Weight) -> Tensor:
    """dx += dy·W in place, each element rounded once to dx's dtype."""
    if not isinstance(W, NF4Weight):
        return add_product(dx, dy, W)
    if dx.dtype == dy.dtype == product_dtype(dy.dtype, dy.device) and W.shape[1] % W.blocksize == 0:
        for k, tile in column_tiles(W, dx.dtype):
            accumulate(dx[:, k], dy, tile)
            del tile
        return dx
    work = torch.promote_types(dx.dtype, torch.float32)
    for rows in _rows(dx, work):
        _add_backward_rows(dx[rows], dy[rows], W, work)
    return dx


def _add_backward_rows(dx: Tensor, dy: Tensor, W: NF4Weight, work: torch.dtype) -> None:
    wide = dx.to(work)
    for n, tile in tiles(W, dy.dtype, work):
        accumulate(wide, dy[:, n].to(work), tile)
        del tile
    if work != dx.dtype:
        dx.copy_(wide)


def _rows(t: Tensor, work: torch.dtype) -> list[slice]:
    """Slices of t's rows: few enough to be held in `work` beside t, all of them where that is t's own dtype."""
    M, K = t.shape
    return slices(M, max(1, M) if work == t.dtype else max(128, WIDE_ELEMENTS // max(K, 1)))


def sum_dtype(t: Tensor, W: Tensor | NF4Weight) -> torch.dtype:
    """The dtype of y and dx before the base product is added: of a 4-bit weight's, a tile at a time is widened."""
    return t.dtype if isinstance(W, NF4Weight) else product_dtype(t.dtype, t.device)
