"""4-bit weights: W dequantised in one launch; y = s·h·Bᵀ + c + x·Wᵀ with W decoded inside the product's loop, or as
[x|h]·[W|s·B]ᵀ + c.

A byte is one 8-byte load from the table of its pair of float32 values; times absmax, rounded once: the bits of nf4.py.
`enable_fp_fusion` is off wherever absmax is computed, for its product and its sum are rounded apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...nf4.tables import pair_table
from ...nf4.weight import NF4Weight
from . import forward, tuning
from .blocks import load_tile, row_major, store_tile
from .gemm import low_rank_tile, tile_of
from .tuning import Tile

DEQUANTIZE = Tile(rows=1, columns=2048, warps=8)  # bytes; a block of 4096 codes is one tile


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


@triton.jit(do_not_specialize=["M"])
def nf4_product_kernel(
    x, codes, pairs, absmax, nested_absmax, nested_map, nested_offset, y, h, B, c, s, M, K, N, R, stride_x,
    BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[M, N] = s·h·Bᵀ + c + x·Wᵀ, a tile per program; rows of W are whole blocks."""
    SPAN: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BC else BC  # codes of a row and step that share an absmax
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BD))
    o_m, o_n = i_m * BM + tl.arange(0, BM), i_n * BD + tl.arange(0, BD)
    acc = low_rank_tile(h, B, c, s, None, 0, o_m, i_n * BD, M, N, R, True, False, PRECISION, BM, BD, BR)
    row = tl.minimum(o_n, N - 1).to(tl.int64) * K
    for k in range(0, K, BC):
        o_byte = k // 2 + tl.arange(0, BC // 2)
        byte = tl.load(codes + row[:, None] // 2 + o_byte[None, :], mask=(2 * o_byte < K)[None, :], other=0)
        first, second = pair_values(pairs, byte)
        o_span = k + SPAN * tl.arange(0, BC // SPAN)
        o_block = (row[:, None] + o_span[None, :]) // BLOCKSIZE
        scale = load_absmax(absmax, nested_absmax, nested_map, nested_offset, o_block, (o_span < K)[None, :])
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BD, BC // SPAN, SPAN // 2)), (BD, BC // 2))
        b_w = tl.interleave(first * scale, second * scale).to(x.dtype.element_ty)
        b_x = load_tile(x, o_m, k + tl.arange(0, BC), stride_x, M, K)
        acc = tl.dot(b_x, b_w.T, acc, input_precision=PRECISION)
    store_tile(y, acc, o_m, o_n, N, M, N)


def dequantize(w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Equations 7 and 8: W in `dtype`, into `out` if given, whose rows may lie apart."""
    if out is None:
        out = torch.empty(w.shape, dtype=dtype or w.dtype, device=w.device)
    if out.numel() == 0:
        return out
    flat = out.is_contiguous()
    if not flat and (out.ndim != 2 or out.stride(1) != 1 or out.stride(0) < out.shape[1]):
        return out.copy_(dequantize(w, out.dtype))
    nf4_dequantize_kernel[(triton.cdiv(len(w.codes), DEQUANTIZE.columns),)](
        w.codes, *_tables(w), out, w.numel(), w.shape[-1], w.shape[-1] if flat else out.stride(0),
        BLOCKSIZE=w.blocksize, FLAT=flat, BLOCK=DEQUANTIZE.columns, num_warps=DEQUANTIZE.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def lora_forward(
    x: Tensor, W: NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 for M > 0 where `refusal` has none: y[M,N] in x's dtype, h[M,R] in A's."""
    x, A, B, c = row_major(x), A.contiguous(), B.contiguous(), None if c is None else c.contiguous()
    h = forward.project(x, A, p, seed)
    return product(x, W, h, B, s, c), h


def refusal(x: Tensor, W: NF4Weight, R: int) -> str | None:
    """Why `product` cannot compute with these, or None."""
    if x.dtype == torch.float32:
        return "x is float32, whose products are the vendor's"
    if W.shape[1] % W.blocksize:
        return f"rows of {W.shape[1]} codes are not whole blocks of {W.blocksize}"
    if R > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products"
    return None


def concat_refusal(x: Tensor, A: Tensor) -> str | None:
    """Why `concat_forward` cannot compute with these, or None."""
    if x.dtype == torch.float32 or x.dtype != A.dtype:
        return f"adapters of {A.dtype} would be rounded or widened beside x of {x.dtype}"
    if A.shape[0] > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products"
    return None


def concat_forward(
    x: Tensor, W: NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 as one product: h, and y = [x|h]·[W|s·B]ᵀ + c, W dequantised into its place in the second factor.

    x is copied once where prefill writes y once more and its product reads it: for wide N. Columns are padded to 16 bytes.
    """
    x, A = row_major(x), A.contiguous()
    (M, K), (N, R) = x.shape, B.shape
    h, padded = forward.project(x, A, p, seed), K + R + -(K + R) % 8
    left, right = x.new_empty(M, padded), x.new_empty(N, padded)
    left[:, :K], left[:, K : K + R], left[:, K + R :] = x, h, 0
    dequantize(W, out=right[:, :K])
    right[:, K : K + R], right[:, K + R :] = s * B, 0
    return left @ right.T if c is None else torch.addmm(c, left, right.T), h


def product(x: Tensor, W: NF4Weight, h: Tensor, B: Tensor, s: float | Tensor, c: Tensor | None) -> Tensor:
    """Equation 2 in one kernel, for 16-bit x with dense rows: y[M, N]."""
    (M, K), N, R = x.shape, W.shape[0], h.shape[1]

    def run(tile: Tile) -> Tensor:
        y = torch.empty(M, N, dtype=x.dtype, device=x.device)
        nf4_product_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
            x, W.codes, *_tables(W), y, h, B, c, s, M, K, N, R, x.stride(0),
            BLOCKSIZE=W.blocksize, PRECISION=tuning.precision(x.dtype), BM=tile.rows, BD=tile.columns, BC=tile.depth,
            BR=tuning.padded_rank(R), num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        return y

    return tuning.first_that_compiles("nf4_product", tuning.arithmetic(x.dtype, h.dtype), R, x.device, run)


def _tables(w: NF4Weight) -> tuple[Tensor | None, ...]:
    return pair_table(w.quant_type, w.device), w.absmax, w.nested_absmax, w.nested_map, w.nested_offset
