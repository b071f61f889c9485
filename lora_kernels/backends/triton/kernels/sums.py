"""Sums of partial results, always in the same order: reruns give the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, kept, specialized
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


def new_parts(count: int, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for `count` partial results [count, *shape] in float32; where there is one, it is the result, in its own dtype."""
    if count == 1:
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.empty(count, *shape, dtype=torch.float32, device=device)


def sum_parts(*sums: tuple[Tensor | None, int, torch.dtype]) -> list[Tensor | None]:
    """Σ over the first dimension of each (parts, count, dtype), three in a launch; one part is its sum, None stays None."""
    outs = [p if p is None or count == 1 else torch.empty_like(p[0], dtype=dtype) for p, count, dtype in sums]
    pairs = zip(sums, outs, strict=True)
    jobs = [(p, out, out.numel(), count) for (p, count, _), out in pairs if p is not None and out is not None and count > 1]
    for first in range(0, len(jobs), 3):
        _sum(jobs[first : first + 3])
    return outs


def _sum(jobs: list[tuple]) -> None:
    blocks = sum([-(-size // SUM.columns) for _, _, size, _ in jobs])
    jobs += [(*jobs[0][:2], 0, 0)] * (3 - len(jobs))  # a job without blocks
    key = [(out.dtype, *specialized(size)) for _, out, size, _ in jobs]
    sums_of(*key)((blocks, 1), *[argument for job in jobs for argument in job])


@kept
def sums_of(*jobs: tuple) -> Launch:
    """The launch of sums of these dtypes and kinds of size."""
    return Launch(sum_kernel, {"num_warps": SUM.warps}, BLOCK=SUM.columns, DEPTH=SUM.rows)
