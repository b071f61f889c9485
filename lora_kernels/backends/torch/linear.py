"""The equations in plain PyTorch: the specification, the CPU backend, the fallback and the tests' oracle.

    M tokens, K in-features, N out-features, R rank
    x[M,K]  W[N,K]  A[R,K]  B[N,R]  c[N] bias  s scaling      y dy [M,N]   h g [M,R]   dx[M,K]   dA dB dc: like A B c

    1  h  = drop(x)·Aᵀ                  4  dx = dy·W + undrop(g·A)
    2  y  = x·Wᵀ + s·h·Bᵀ + c           5  dA = gᵀ·drop(x)
    3  g  = s·dy·B                      6  dB = s·dyᵀ·h      dc = Σ dy

drop(v) = v · keep / (1 - p̂), with the mask of dropout.py; undrop is its transpose, the same product. The factor 1 / (1 - p̂)
is applied on the R-wide side. Where the base weight is trained too, dW = dyᵀ·x.

In 2 and 4 the low-rank term is written first and the base product is added to it in place, so that the low-rank term is
rounded once. Rows are taken in chunks: what equations 1, 3-6 need of a chunk is read once, stays in cache, and is computed in
`work_dtype`; x is never copied whole.

W may be an NF4Weight. It then meets its two products a tile at a time, dequantised into memory that the next tile overwrites,
and both read the same values: W rounded to x's dtype.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ... import cpu_extension
from ...mask import KeepRows, keep_scale, row_chunks
from ...nf4.weight import NF4Weight, column_tiles, tiles
from ...scratch import slices

READS_NF4 = True
WIDE_ELEMENTS = 5 << 18  # of x or dx that are held in float32 at a time: with tiles and the mask, below 16 MiB


class Needs(NamedTuple):
    """Which gradients a backward pass computes."""

    dx: bool
    dA: bool
    dB: bool
    dc: bool


def lora_forward(
    x: Tensor, W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2: y[M,N] in x's dtype, h[M,R] in A's."""
    (M, K), N, work, scale = x.shape, W.shape[0], work_dtype(x, A), keep_scale(p)
    y, h = x.new_empty(M, N, dtype=sum_dtype(x, W)), A.new_empty(M, A.shape[0])
    Aw, Bw, cw = A.to(work), B.to(work), None if c is None else c.to(work)
    keep = KeepRows(K, p, seed, dtype=work) if p > 0 else None
    for rows in row_chunks(M, max(K, N), x.device):
        xw = x[rows].to(work)
        h[rows] = xw @ Aw.T if keep is None else (keep(rows).mul_(xw) @ Aw.T).mul_(scale)  # 1
        set_product(y[rows], h[rows].to(work) * s, Bw.T, cw)
    del xw  # the product needs that memory
    return add_forward_product(y, x, W).to(x.dtype), h  # 2


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    W: Tensor | NF4Weight | None,
    A: Tensor | None,
    B: Tensor | None,
    h: Tensor | None,
    s: float | Tensor,
    p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 3 to 6: those of (dx, dA, dB, dc) that `needs` names, None for the others.

    What no needed equation reads may be None: dx reads W, A and B; dA reads x and B; dB reads h. dx has dy's dtype, dA and dB
    have the adapter's, dc is in float32 or wider.
    """
    (M, N), work = dy.shape, work_dtype(*(t for t in (dy, B, h) if t is not None))
    Aw = None if A is None else A.to(work)
    Bw = None if B is None else B.to(work).T.contiguous().T  # dy·B is twice as fast with B's columns contiguous
    K = W.shape[1] if needs.dx else x.shape[1] if needs.dA else 0
    keep = KeepRows(K, p, seed, dtype=work) if p > 0 and (needs.dx or needs.dA) else None
    factor = s * keep_scale(p)  # the factors that 4 and 5 share, by way of 3
    dx = dy.new_empty(M, K, dtype=sum_dtype(dy, W)) if needs.dx else None
    dA = dB = dc = None
    for rows in row_chunks(M, max(K, N), dy.device):
        dyw = dy[rows].to(work)
        if needs.dB:
            dB = total(dB, ((h[rows].to(work) * s).T @ dyw).T)  # 6
        if needs.dc:
            dc = total(dc, dyw.sum(0, dtype=torch.promote_types(work, torch.float32)))  # 6
        if not (needs.dA or needs.dx):
            continue
        g = (dyw @ Bw) * factor  # 3
        mask = None if keep is None else keep(rows)
        if needs.dx:
            dx_rows = set_product(dx[rows], g, Aw)
            if mask is not None:
                dx_rows.mul_(mask)
        if needs.dA:
            xw = x[rows].to(work)
            dA = total(dA, g.T @ (xw if mask is None else mask.mul_(xw)))  # 5
    del dyw  # the product needs that memory
    if needs.dx:
        dx = add_backward_product(dx, dy, W).to(dy.dtype)  # 4
    return dx, None if dA is None else dA.to(B.dtype), None if dB is None else dB.to(h.dtype).contiguous(), dc


def why_not(x: Tensor, weight: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None) -> None:
    """None: PyTorch computes with any tensors that pass the checks."""


def notes(x: Tensor) -> list[str]:
    """What is missing here that would make it faster on x's device."""
    slow = x.device.type == "cpu" and cpu_extension.extension is None
    return [f"dropout masks and 4-bit weights by PyTorch operations: {cpu_extension.why_not}"] if slow else []


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW = dyᵀ·x, for a base weight that is trained as well."""
    dtype = product_dtype(x.dtype, x.device)
    return add_product(dy.new_zeros(dy.shape[1], x.shape[1], dtype=dtype), dy.T, x).to(x.dtype)


def total(sum_so_far: Tensor | None, part: Tensor) -> Tensor:
    """The sum over chunks of rows, in float32 or wider."""
    part = part.to(torch.promote_types(part.dtype, torch.float32))
    return part if sum_so_far is None else sum_so_far.add_(part)


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among the tensors; float32 where that would be a 16-bit type on a CPU.

    A CPU that multiplies bfloat16 would be a sixth faster in it without dropout, but one result in 600 had up to three times
    the error of PyTorch's operations.
    """
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return torch.promote_types(dtype, torch.float32) if tensors[0].device.type == "cpu" else dtype


def set_product(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """out = a·b + c, rounded once to out's dtype."""
    if out.dtype != a.dtype:
        return out.copy_(a @ b if c is None else torch.addmm(c, a, b))
    return torch.mm(a, b, out=out) if c is None else torch.addmm(c, a, b, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a·b in place, in out's dtype: the product's own, or float32 in tiles, whose copies stay small."""
    if out.dtype == a.dtype:
        return accumulate(out, a, b)
    for rows in slices(a.shape[0], 2048):
        wide = a[rows].to(out.dtype)
        for columns in slices(b.shape[1], 512):
            out[rows, columns].addmm_(wide, b[:, columns].to(out.dtype))
    return out


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a·b in place; all of one dtype."""
    return out.add_(a @ b) if _is_thin(out) else out.addmm_(a, b)


def _is_thin(out: Tensor) -> bool:
    """Whether a CPU would sum a·b into float32 or float64 `out` term by term, with up to 7 times the error of adding it once.

    MKL does so for one or two rows and for up to eight columns.
    """
    return min(out.shape) < 16 and out.device.type == "cpu" and out.dtype.itemsize >= 4


def add_forward_product(y: Tensor, x: Tensor, W: Tensor | NF4Weight) -> Tensor:
    """y += x·Wᵀ in place."""
    if not isinstance(W, NF4Weight):
        return add_product(y, x, W.T)
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


def add_backward_product(dx: Tensor, dy: Tensor, W: Tensor | NF4Weight) -> Tensor:
    """dx += dy·W in place, each element rounded once to dx's dtype."""
    if not isinstance(W, NF4Weight):
        return add_product(dx, dy, W)
    if dx.dtype == product_dtype(dy.dtype, dy.device) and W.shape[1] % W.blocksize == 0:
        for k, tile in column_tiles(W, dx.dtype):
            accumulate(dx[:, k], dy, tile)
        return dx
    work = torch.promote_types(dx.dtype, torch.float32)
    for rows in _rows(dx, work):
        _add_backward_rows(dx[rows], dy[rows], W, work)
    return dx


def _add_backward_rows(dx: Tensor, dy: Tensor, W: NF4Weight, work: torch.dtype) -> None:
    wide = dx.to(work)
    for n, tile in tiles(W, dy.dtype, work):
        accumulate(wide, dy[:, n].to(work), tile)
    if work != dx.dtype:
        dx.copy_(wide)


def _rows(t: Tensor, work: torch.dtype) -> list[slice]:
    """Slices of t's rows: few enough to be held in `work` beside t, all of them where that is t's own dtype."""
    M, K = t.shape
    return slices(M, max(1, M) if work == t.dtype else max(128, WIDE_ELEMENTS // max(K, 1)))


def sum_dtype(t: Tensor, W: Tensor | NF4Weight) -> torch.dtype:
    """The dtype of y and dx before the base product is added: of a 4-bit weight's, a tile at a time is widened."""
    return t.dtype if isinstance(W, NF4Weight) else product_dtype(t.dtype, t.device)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of `dtype` are computed and summed up: itself where the device multiplies it, else float32.

    A CPU without instructions for a 16-bit dtype falls to a scalar loop in PyTorch (seconds to minutes per layer).
    """
    return torch.float32 if device.type == "cpu" and not cpu_multiplies(dtype) else dtype


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for `dtype` that PyTorch uses."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
