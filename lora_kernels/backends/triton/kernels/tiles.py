"""What every kernel shares: tiles of row-major matrices and dot products of two dtypes."""

import triton
import triton.language as tl
from torch import Tensor


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


def row_major(t: Tensor) -> Tensor:
    """`t` with contiguous, not overlapping rows: itself where it is a row-strided view, otherwise a copy."""
    if t.is_contiguous():
        return t
    rows, columns = t.shape
    dense = (t.stride(1) == 1 or columns == 1) and (t.stride(0) >= columns or rows == 1)
    return t if dense else t.contiguous()
