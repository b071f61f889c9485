"""Equation 13 (reference/magnitude.py): dv, dm and dc in one pass over dy and v."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launch import Launch, dtype_of, kept
from ..tuning import COLUMN_SUMS
from .magnitude import over
from .sums import new_parts, sum_parts
from .tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["M"])
def magnitude_backward_kernel(
    dy, v, m, n, dv, parts_dm, parts_dc, M, N, stride_dy, part_rows, BM: tl.constexpr, BN: tl.constexpr
):
    """dv = (m / n) ⊙ dy, dm = (1 / n) Σ dy ⊙ v, dc = Σ dy: one program's strip of BN columns and range of rows.

    parts_dm[i_m, N], parts_dc[i_m, N]; what is None is not computed, or not there.
    """
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BN + tl.arange(0, BN)
    inside = o_n < N
    if n is not None:
        b_n = tl.load(n + o_n, mask=inside, other=0.0)
    if dv is not None:
        u = over(tl.load(m + o_n, mask=inside, other=0.0).to(tl.float32), b_n)
    acc_dm, acc_dc = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
    for row in range(i_m * part_rows, tl.minimum(M, (i_m + 1) * part_rows), BM):
        o_m = row + tl.arange(0, BM)
        b_dy = load_tile(dy, o_m, o_n, stride_dy, M, N).to(tl.float32)
        if parts_dm is not None:
            acc_dm += b_dy * load_tile(v, o_m, o_n, N, M, N).to(tl.float32)
        if parts_dc is not None:
            acc_dc += b_dy
        if dv is not None:
            store_tile(dv, b_dy * u[None, :], o_m, o_n, N, M, N)
    o_part = i_m.to(tl.int64) * N + o_n
    if parts_dm is not None:
        tl.store(parts_dm + o_part, over(tl.sum(acc_dm, axis=0), b_n), mask=inside)
    if parts_dc is not None:
        tl.store(parts_dc + o_part, tl.sum(acc_dc, axis=0), mask=inside)


def magnitude_backward(
    dy: Tensor, v: Tensor | None, m: Tensor, n: Tensor | None, need_v: bool, need_m: bool, need_c: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dv in dy's dtype, dm, dc in float32), each if needed, for dy[M, N] of dense rows and v without gaps."""
    (M, N), room = dy.shape, {"dtype": torch.float32, "device": dy.device}
    strips, programs = -(-N // COLUMN_SUMS.columns), 2 * tuning.gpu(dy.device).processors
    count, part_rows = tuning.splits(M, COLUMN_SUMS.rows, strips, programs)
    dv = torch.empty(M, N, dtype=dy.dtype, device=dy.device) if need_v else None
    parts_dm = new_parts(count, N, **room) if need_m else None  # type: ignore[arg-type]
    parts_dc = new_parts(count, N, **room) if need_c else None  # type: ignore[arg-type]
    v, m_read, n = v if need_m else None, m if need_v else None, n if need_v or need_m else None
    launch = gradients(dy.dtype, dtype_of(v), dtype_of(m_read), need_v, need_m, need_c, N, dy.stride(0))
    launch((strips, count), dy, v, m_read, n, dv, parts_dm, parts_dc, M, N, dy.stride(0), part_rows)
    dm, dc = sum_parts((parts_dm, count, torch.float32), (parts_dc, count, torch.float32))
    return dv, dm, dc


@kept
def gradients(
    dtype: torch.dtype,
    of_v: torch.dtype | None,
    of_m: torch.dtype | None,
    need_v: bool,
    need_m: bool,
    need_c: bool,
    N: int,
    stride_dy: int,
) -> Launch:
    """The launch of `magnitude_backward` over tensors of this kind."""
    return Launch(magnitude_backward_kernel, COLUMN_SUMS.options(), BM=COLUMN_SUMS.rows, BN=COLUMN_SUMS.columns)
