"""What every kernel shares: tiles of row-major matrices, dot products of two dtypes, ordered sums of partial sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import SUM


@triton.jit
def load_tile(p, o_row, o_column, stride, rows, columns):
    """p[o_row, o_column] of a row-major [rows, columns], 0 outside; 64-bit row offsets reach beyond 2^31 elements."""
    inside = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    return tl.load(p + o_row.to(tl.int64)[:, None] * stride + o_column[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(p, value, o_row, o_column, stride, rows, columns):
    """p[o_row, o_column] = value inside a row-major [rows, columns], in p's dtype."""
    inside = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    p_tile = p + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
    tl.store(p_tile, value.to(p.dtype.element_ty), mask=inside)


@triton.jit
def scalar(s):
    """s itself, or read from the device where it is a tensor: no synchronisation and no compilation per value."""
    s = tl.core.to_tensor(s)
    if s.dtype.is_ptr():
        s = tl.load(s)
    return s.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32, for activations `a` and adapters `b` of any two dtypes.

    float32 adapters over bfloat16 activations: b is cut exactly into three bfloat16 parts (3·8 = 24 bits), so that the
    activations are multiplied as they lie. The parts are summed apart from `acc`: tensor cores truncate, so a whole
    contraction accumulated inside them would bias a float32 sum; that of one tile does not. Others meet in float32.
    """
    if a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high = b.to(tl.bfloat16)
        rest = b - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc += tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def sum_block(parts, out, i_block, size, count, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """out[block] = Σ parts[count, block], always in the same order; DEPTH independent loads hide the latency."""
    o_item = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_part = tl.arange(0, DEPTH)
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(0, count, DEPTH):
        p_parts = parts + (part + o_part).to(tl.int64)[:, None] * size + o_item[None, :]
        inside = (part + o_part < count)[:, None] & (o_item < size)[None, :]
        acc += tl.sum(tl.load(p_parts, mask=inside, other=0.0), axis=0)
    tl.store(out + o_item, acc.to(out.dtype.element_ty), mask=o_item < size)


@triton.jit(do_not_specialize=["count0", "count1", "count2"])
def sum_kernel(
    parts0, out0, size0, count0, parts1, out1, size1, count1, parts2, out2, size2, count2,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out_i = Σ parts_i[count_i, size_i] for up to three sums in one launch."""
    i_block = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(size0, BLOCK), tl.cdiv(size1, BLOCK)
    if i_block < blocks0:
        sum_block(parts0, out0, i_block, size0, count0, BLOCK, DEPTH)
    elif i_block < blocks0 + blocks1:
        sum_block(parts1, out1, i_block - blocks0, size1, count1, BLOCK, DEPTH)
    else:
        sum_block(parts2, out2, i_block - blocks0 - blocks1, size2, count2, BLOCK, DEPTH)


def new_parts(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for `count` partial results in float32; where there is only one, it is the result, in the result's dtype."""
    return torch.empty(count, *shape, dtype=dtype if count == 1 else torch.float32, device=device)


def sum_parts(*sums: tuple[Tensor | None, torch.dtype]) -> list[Tensor | None]:
    """Σ over the first dimension of each `parts`, in its dtype, in one launch; None stays None."""
    outs = [None if p is None else p[0] if len(p) == 1 else torch.empty_like(p[0], dtype=d) for p, d in sums]
    both = [(p, out) for (p, _), out in zip(sums, outs, strict=True) if p is not None and len(p) > 1]
    jobs = [(p, out, out.numel(), len(p)) for p, out in both]
    if jobs:
        blocks = sum(triton.cdiv(size, SUM.columns) for _, _, size, _ in jobs)
        jobs += [(*jobs[0][:2], 0, 0)] * (3 - len(jobs))  # a job without blocks
        arguments = [argument for job in jobs for argument in job]
        sum_kernel[(blocks,)](*arguments, BLOCK=SUM.columns, DEPTH=SUM.rows, num_warps=SUM.warps)
    return outs


def row_major(t: Tensor) -> Tensor:
    """`t` with contiguous, not overlapping rows: itself where it is a row-strided view, otherwise a copy."""
    rows, columns = t.shape
    dense = (t.stride(1) == 1 or columns == 1) and (t.stride(0) >= columns or rows == 1)
    return t if dense else t.contiguous()
