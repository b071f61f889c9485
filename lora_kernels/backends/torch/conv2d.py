"""Equations 18 to 22 (reference/conv2d.py): the vendor's convolutions for W and A, B in place in their results."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import KeepRows, chunk_elements, keep_scale, row_chunks
from ...scratch import slices
from ...values import Dropout, LoRAWeights, Window
from .engine import add_low_rank, to, work_dtype

TURNED = 1024  # pixels of a sample from which on its mask is turned on its own: in fewer the operations cost more
Needs = tuple[bool, bool, bool, bool, bool]  # of x, W, A, B and c


def forward(x: Tensor, member: LoRAWeights, dropout: Dropout | None, position: str, window: Window) -> tuple[Tensor, Tensor]:
    """Equations 18 and 19: y[n,N,·,·] and h[n,R,·,·], which is dropped where position is "h"."""
    W, A, B, c, s, _ = member
    y = _convolve(x, W, None if c is None else to(c, x.dtype), window)  # type: ignore[arg-type]
    of_x, of_h = (dropout, None) if position == "x" else (None, dropout)
    h = _down(x, A, of_x, window)  # type: ignore[arg-type]
    if of_h is not None:
        h = _drop(h, of_h)
    return _add_up(y, h, B.flatten(1), s), h  # type: ignore[union-attr]


def backward(
    dy: Tensor,
    x: Tensor | None,
    shape: torch.Size,
    member: LoRAWeights,
    h: Tensor | None,
    dropout: Dropout | None,
    position: str,
    window: Window,
    needs: Needs,
) -> list[Tensor | None]:
    """Equations 20 to 22: the gradients of x (of this shape), W, A, B and c, None for those that are not wanted."""
    W, A, B, _, s, _ = member
    need_x, need_W, need_A, need_B, need_c = needs
    of_x, of_h = (dropout, None) if position == "x" else (None, dropout)
    dy = dy.contiguous(memory_format=torch.channels_last if _is_channels_last(dy) else torch.contiguous_format)
    dx = dW = dA = dB = dc = None
    merges = need_x and dropout is None and _merges(dy, W, A)  # type: ignore[arg-type]
    if need_x or need_W:
        weight = _merged(W, A, B, s) if merges else W  # type: ignore[arg-type]
        dx, dW = _gradients(dy, x, shape, weight, window, (need_x, need_W))  # type: ignore[arg-type]
    if need_A or (need_x and not merges):
        g = _project(dy, B.flatten(1), s)  # 20  # type: ignore[union-attr]
        g = g if of_h is None else _drop(g, of_h)
        dropped = x if x is None or of_x is None else _drop(x, of_x)
        wanted = need_x and not merges, need_A
        low_rank, dA = _gradients(g, dropped, shape, A, window, wanted)  # 22  # type: ignore[arg-type]
        if low_rank is not None:
            dx.add_(low_rank if of_x is None else _drop(low_rank, of_x))  # 21  # type: ignore[union-attr]
    if need_B:
        dB = _outer(dy, h, s)[:, :, None, None]  # 22  # type: ignore[arg-type]
    if need_c:
        dc = dy.sum((0, 2, 3), dtype=torch.promote_types(dy.dtype, torch.float32))
    return [dx, dW, dA, dB, dc]


def _merges(dy: Tensor, W: Tensor, A: Tensor) -> bool:
    """Whether dx is dy ∗' (W + s·B·A): where that weight is smaller than the g ∗' A that it spares, and rounded to float32 or
    wider. A convolution of R channels has a small share of the vendor's speed: a step of [2, 128, 32, 32] without it takes 20.8
    ms of a CPU's thread in place of 22.7; in channels-last memory both take 16.9.
    """
    pixels = dy.numel() // max(1, dy.shape[1])
    return W.dtype == A.dtype and W.dtype.itemsize >= 4 and pixels * W.shape[1] >= W.numel()


def _merged(W: Tensor, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """W + s·B·A, in W's memory format."""
    B = B.flatten(1) * s if isinstance(s, Tensor) else B.flatten(1)
    total = torch.addmm(W.flatten(1), B, A.flatten(1), alpha=1.0 if isinstance(s, Tensor) else s).view(W.shape)
    return total.contiguous(memory_format=torch.channels_last) if _is_channels_last(W) else total


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    lines, columns = window.beyond
    x = F.pad(x, (0, columns, 0, lines)) if lines or columns else x
    return F.conv2d(x, weight, bias, window.stride, window.padding, window.dilation)


def _down(x: Tensor, A: Tensor, dropout: Dropout | None, window: Window) -> Tensor:
    """h = drop(x) ∗ A in A's dtype, computed in the wider of both."""
    wide = torch.promote_types(x.dtype, A.dtype)
    x = to(x, wide)
    return _convolve(x if dropout is None else _drop(x, dropout), to(A, wide), None, window).to(A.dtype)


def _gradients(
    dy: Tensor, x: Tensor | None, shape: torch.Size, weight: Tensor, window: Window, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, d weight), those that `mask` says, of y = x ∗ weight; x may be None where only its shape is read."""
    lines, columns = window.beyond
    wide = torch.promote_types(dy.dtype, weight.dtype)
    if x is None:
        x = dy.new_empty(1, dtype=wide).expand(*shape[:2], shape[2] + lines, shape[3] + columns)
    elif lines or columns:
        x = F.pad(x, (0, columns, 0, lines))
    own = (to(dy, wide), to(x, wide), to(weight, wide))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *own, None, window.stride, window.padding, window.dilation, False, (0, 0), 1, (*mask, False)
    )
    if dx is not None and (lines or columns):
        dx = dx[:, :, : shape[2], : shape[3]].contiguous()
    return dx, dw


# ---- 1x1 convolutions, over y as it lies in memory: pixels as rows, or planes of channels ----


def _is_channels_last(t: Tensor) -> bool:
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _pixels(t: Tensor) -> Tensor:
    """t[n, N, H, W] as [pixels, N], without a copy where it is in channels-last memory."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _add_up(y: Tensor, h: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """y += s·h ∗ B in place, each element rounded once."""
    n, N, height, width = y.shape
    if _is_channels_last(y):
        add_low_rank(y.permute(0, 2, 3, 1).view(-1, N), _pixels(h), B, s)
        return y
    work, planes = work_dtype(y, B), y.flatten(2)
    of_planes, B = to(h, work).flatten(2), to(B, work)
    of_planes, s = (of_planes, s) if isinstance(s, (int, float)) else (of_planes * s, 1.0)
    if work == y.dtype:
        planes.baddbmm_(B.expand(n, *B.shape), of_planes, alpha=s)
        return y
    for part in row_chunks(n, N * height * width, y.device):
        planes[part].add_(B @ of_planes[part], alpha=s)
    return y


def _project(dy: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """g = s·dy ∗ Bᵀ in B's dtype, as dy lies in memory."""
    work, (n, _, height, width), R = work_dtype(dy, B), dy.shape, B.shape[1]
    wide, B_wide = to(dy, work), to(B, work)
    if _is_channels_last(dy):
        g = (_pixels(wide) @ B_wide).mul_(s).view(n, height, width, R).permute(0, 3, 1, 2)
    else:
        g = torch.bmm(B_wide.T.expand(n, *B.T.shape), wide.flatten(2)).mul_(s).view(n, R, height, width)
    return to(g, B.dtype)


def _outer(dy: Tensor, h: Tensor, s: float | Tensor) -> Tensor:
    """dB[N, R] = s·Σ dy·h over pixels, in h's dtype."""
    work = work_dtype(dy, h)
    wide, h_wide = to(dy, work), to(h, work)
    if _is_channels_last(dy):
        dB = (_pixels(h_wide).T @ _pixels(wide)).T
    else:
        dB = torch.bmm(wide.flatten(2), h_wide.flatten(2).mT).sum(0)
    return (dB * s).to(h.dtype)


# ---- dropout by (sample, line, column; channel) ----


def _drop(v: Tensor, dropout: Dropout) -> Tensor:
    """drop(v[n, C, H, W]), as v lies in memory."""
    n, C, height, width = v.shape
    out, keep = torch.empty_like(v), KeepRows(C, dropout.p, dropout.seed, offset=dropout.offset, dtype=v.dtype)
    scale = keep_scale(dropout.p)
    turns = v.device.type == "cpu" and height * width >= TURNED and not _is_channels_last(v)
    for samples, lines in _chunks(n, height, width * C, v.device, alone=turns):
        start, count = samples.start * height + lines.start, (samples.stop - samples.start) * (lines.stop - lines.start)
        rows = keep(slice(start * width, (start + count) * width)).mul_(scale)
        part, target = v[samples, :, lines], out[samples, :, lines]
        if turns:  # a transposed copy and a product are twice as fast as a product of a transposed mask
            kept = torch.empty_like(rows.T, memory_format=torch.contiguous_format).copy_(rows.T).view(part.shape)
        else:
            kept = rows.view(part.shape[0], part.shape[2], width, C).permute(0, 3, 1, 2)
        torch.mul(part, kept, out=target)
    return out


def _chunks(n: int, height: int, line: int, device: torch.device, *, alone: bool) -> Iterator[tuple[slice, slice]]:
    """(samples, lines) with all lines of some samples, or some lines of one. alone: of one sample in any case."""
    lines = max(1, chunk_elements(device) // max(1, line))
    if lines < height or alone:
        yield from ((slice(i, i + 1), some) for i in range(n) for some in slices(height, lines))
    else:
        yield from ((samples, slice(0, height)) for samples in slices(n, lines // max(1, height)))
