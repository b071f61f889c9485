"""What every kernel shares: tiles of row-major matrices and dot products of two dtypes."""

from typing import Any

import torch
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
def cut(v):
    """(high, rest): v is their sum, high in bfloat16 and rest in float32 with 8 bits less."""
    high = v.to(tl.bfloat16)
    return high, v.to(tl.float32) - high.to(tl.float32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32, a·b where acc is None, for activations `a` and adapters `b` of any two dtypes.

    "parts", with 16-bit activations: operands of two dtypes are cut exactly into bfloat16 parts, two of float16 (8 + 3 bits),
    three of float32 (3·8). Products of parts below 2^-24 are left out; where both are float32 adapters (h·Bᵀ, g·A), whose
    result becomes 16 bits, those below 2^-16. Triton's own 3xTF32 and 3xBF16 look for NaN in every partial result, a third
    of a prefill's instructions; here inf gives NaN.
    The parts are summed apart from `acc`: tensor cores truncate, so a whole contraction accumulated inside them would bias
    a float32 sum; that of one tile does not.
    """
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, acc)
    elif PRECISION != "parts":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        product = products_of_parts(a, b)
        return product if acc is None else acc + product


@triton.jit
def products_of_parts(a, b):
    """a·b, the smallest products first."""
    a0, a_rest = cut(a)
    b0, b_rest = cut(b)
    b1, b_last = cut(b_rest)
    a1, b2 = a_rest.to(tl.bfloat16), b_last.to(tl.bfloat16)
    product = None
    if a.dtype != tl.float32 and b.dtype == tl.float32:
        if a.dtype == tl.float16:
            product = tl.dot(a1, b1)
        product = tl.dot(a0, b2, product)
    if a.dtype != tl.bfloat16:
        product = tl.dot(a1, b0, product)
    if b.dtype != tl.bfloat16:
        product = tl.dot(a0, b1, product)
    return tl.dot(a0, b0, product)


def row_major(t: Tensor) -> Tensor:
    """`t` with contiguous, not overlapping rows: itself where it is a row-strided view, otherwise a copy."""
    if t.is_contiguous():
        return t
    rows, columns = t.shape
    dense = (t.stride(1) == 1 or columns == 1) and (t.stride(0) >= columns or rows == 1)
    return t if dense else t.contiguous()


def adjacent(t: Any) -> Any:
    """t.contiguous(), or None; asked first, because the call itself takes a µs for a parameter."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def readable(s: float | Tensor, device: torch.device) -> float | Tensor:
    """What `scalar` takes: a tensor on the device, which is read there; of anything else its value, which is at hand."""
    return s if s.__class__ is float or (isinstance(s, Tensor) and s.device == device) else float(s)
