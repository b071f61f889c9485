"""Equations 7 and 8: a 4-bit W dequantised in one launch.

A byte is one 8-byte load from the table of its pair of float32 values; times absmax, rounded once: reference/nf4.py's bits.
`enable_fp_fusion` is off wherever absmax is computed, for its product and its sum are rounded apart.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....nf4 import NF4Weight
from ....nf4.tables import pair_table
from ..launch import Launch, kept
from ..tuning import DEQUANTIZE


@triton.jit
def pair_values(pairs, byte):
    """(first, second): the float32 values of the codes in each byte."""
    pair = tl.load(pairs + byte.to(tl.int32))
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_absmax(absmax, nested_absmax, nested_map, nested_offset, o_block, inside):
    """absmax[o_block], equation 8 where it is nested; 0 or the offset outside."""
    value = tl.load(absmax + o_block, mask=inside, other=0)
    if nested_absmax is not None:
        scale = tl.load(nested_absmax + o_block // 256, mask=inside, other=0.0)
        value = tl.load(nested_map + value.to(tl.int32)) * scale + tl.load(nested_offset)
    return value


@triton.jit
def nf4_dequantize_kernel(
    codes, pairs, absmax, nested_absmax, nested_map, nested_offset, out, elements, columns, stride_out,
    BLOCKSIZE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[element] = table[code]·absmax[block]: a program decodes BLOCK bytes, whole blocks. FLAT: out's rows are adjacent."""
    BYTES: tl.constexpr = BLOCKSIZE // 2
    BLOCKS: tl.constexpr = BLOCK // BYTES
    o_block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    scale = load_absmax(absmax, nested_absmax, nested_map, nested_offset, o_block, o_block * BLOCKSIZE < elements)
    o_byte = o_block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    first, second = pair_values(pairs, tl.load(codes + o_byte, mask=2 * o_byte < elements, other=0))
    value = tl.interleave(first * scale[:, None], second * scale[:, None])
    o_element = o_block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    p_out = out + o_element
    if not FLAT:
        row = o_element // columns
        p_out = out + row * stride_out + (o_element - row * columns)
    tl.store(p_out, value.to(out.dtype.element_ty), mask=o_element < elements)


@triton.jit
def decoded_tile(
    codes, pairs, absmax, nested_absmax, nested_map, nested_offset, o_row, k, K, BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr,
    BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """W[row, k : k + BC] in float32 of BD rows, K wide, that begin at the elements o_row.

    SPAN divides the blocks, BC, k and what the rows begin at: so many codes share an absmax; rows of whole blocks leave the
    smaller of BLOCKSIZE and BC.
    """
    o_byte = k // 2 + tl.arange(0, BC // 2)
    byte = tl.load(codes + o_row[:, None] // 2 + o_byte[None, :], mask=(2 * o_byte < K)[None, :], other=0)
    first, second = pair_values(pairs, byte)
    o_span = k + SPAN * tl.arange(0, BC // SPAN)
    o_block = (o_row[:, None] + o_span[None, :]) // BLOCKSIZE
    scale = load_absmax(absmax, nested_absmax, nested_map, nested_offset, o_block, (o_span < K)[None, :])
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BD, BC // SPAN, SPAN // 2)), (BD, BC // 2))
    return tl.interleave(first * scale, second * scale)


def dequantize(w: NF4Weight, out: Tensor) -> None:
    """Equations 7 and 8: W's elements, in order, into the rows of out[rows, columns]."""
    (rows, columns), elements, stride_out = out.shape, w.numel(), out.stride(0)
    flat, nested = rows == 1 or stride_out == columns, w.nested_absmax is not None
    if flat:
        columns = stride_out = elements
    launch = dequantization(elements, columns, stride_out, w.blocksize, flat, out.dtype, w.absmax.dtype, nested)
    programs = -(-w.codes.shape[0] // DEQUANTIZE.columns)
    launch((programs, 1), w.codes, *tables(w), out, elements, columns, stride_out)


def dense(
    W: Tensor | NF4Weight | None, dtype: torch.dtype, decode: Callable[[NF4Weight, Tensor], None] = dequantize
) -> Tensor | None:
    """A 4-bit weight in memory that lives for this call; others as they are."""
    if not isinstance(W, NF4Weight):
        return W
    out = torch.empty(W.shape, dtype=dtype, device=W.device)
    if out.numel():
        decode(W, out)
    return out


@kept
def dequantization(
    elements: int,
    columns: int,
    stride_out: int,
    blocksize: int,
    flat: bool,
    dtype: torch.dtype,
    of_absmax: torch.dtype,
    nested: bool,
) -> Launch:
    """The launch of `dequantize` for weights and results of this kind."""
    return Launch(
        nf4_dequantize_kernel, {"num_warps": DEQUANTIZE.warps, "enable_fp_fusion": False},
        BLOCKSIZE=blocksize, FLAT=flat, BLOCK=DEQUANTIZE.columns,
    )  # fmt: skip


Kind = tuple[int, torch.dtype, bool]


def kind(w: NF4Weight) -> Kind:
    """(blocksize, absmax's dtype, whether it is nested): what a kernel that decodes is compiled for."""
    return w.blocksize, w.absmax.dtype, w.nested_absmax is not None


def tables(w: NF4Weight) -> tuple[Tensor | None, ...]:
    return pair_table(w.quant_type, w.device), w.absmax, w.nested_absmax, w.nested_map, w.nested_offset
