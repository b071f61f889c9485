"""Sums of partial results, always in the same order: reruns give the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import SUM


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
