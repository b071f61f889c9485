"""Equation 11 (reference/magnitude.py): ‖W + s·B·A‖ by rows in one pass over W; a tile of the sum exists in registers alone."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....dtypes import dtype_name
from ....nf4 import NF4Weight
from .. import tuning
from ..launch import Launch, call, dtype_of
from ..tuning import Tile
from .nf4_dequantize import Kind, decoded_tile, tables
from .nf4_dequantize import kind as kind_of_4_bits
from .sums import new_parts, sum_parts
from .tiles import cut, dot, load_tile, scalar


@triton.jit
def update_of(b_B, b_A, PRECISION: tl.constexpr):
    """B·A of a tile in float32. Of float32 adapters beside a 16-bit W only products of parts below 2^-24 are left out, where
    `dot` leaves out those below 2^-16: W may cancel B·A.
    """
    if b_B.dtype != tl.float32 or PRECISION != "parts":
        return dot(b_B, b_A, None, PRECISION)
    else:
        B0, rest = cut(b_B)
        B1, B2 = cut(rest)
        A0, rest = cut(b_A)
        A1, A2 = cut(rest)
        product = tl.dot(B0, A2.to(tl.bfloat16), tl.dot(B1, A1, tl.dot(B2.to(tl.bfloat16), A0)))
        return tl.dot(B0, A0, tl.dot(B0, A1, tl.dot(B1, A0, product)))


@triton.jit
def row_norm_kernel(
    W, codes, pairs, absmax, nested_absmax, nested_map, nested_offset, A, B, parts, s, N, K, stride_n, stride_k, part_columns,
    R: tl.constexpr, DTYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Σ (W + s·B·A)² by rows, W rounded to DTYPE: parts[i_k, N] of one range of columns each; a program owns BM rows of one.

    W[N, K] of any strides, or None: codes of 4 bits, whose rows are whole blocks.
    """
    i_n, i_k = tl.program_id(0), tl.program_id(1)
    o_n, o_r = i_n * BM + tl.arange(0, BM), tl.arange(0, BR)
    acc, row = tl.zeros([BM, BK], tl.float32), tl.minimum(o_n, N - 1).to(tl.int64)
    s, b_B = scalar(s), load_tile(B, o_n, o_r, R, N, R)
    for k in range(i_k * part_columns, tl.minimum(K, (i_k + 1) * part_columns), BK):
        o_k = k + tl.arange(0, BK)
        if W is None:
            SPAN: tl.constexpr = BLOCKSIZE if BLOCKSIZE < BK else BK
            b_W = decoded_tile(
                codes, pairs, absmax, nested_absmax, nested_map, nested_offset, row * K, k, K, BLOCKSIZE, SPAN, BM, BK
            )
            b_W = tl.where((o_k < K)[None, :], b_W, 0.0)  # beyond K there is a nested absmax's offset
        else:
            p_W = W + row[:, None] * stride_n + o_k.to(tl.int64)[None, :] * stride_k
            b_W = tl.load(p_W, mask=(o_k < K)[None, :], other=0.0)
        b_A = load_tile(A, o_r, o_k, K, R, K)
        b_W = b_W.to(DTYPE).to(tl.float32) + s * update_of(b_B, b_A, PRECISION)
        acc += b_W * b_W
    tl.store(parts + i_k.to(tl.int64) * N + o_n, tl.sum(acc, axis=1), mask=o_n < N)


def refusal(W: Tensor | NF4Weight, R: int) -> str | None:
    """Why `row_norm` cannot compute with these, or None."""
    if R > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products"
    if isinstance(W, NF4Weight) and W.shape[1] % W.blocksize:
        return f"rows of {W.shape[1]} codes are not whole blocks of {W.blocksize}"
    return None


def row_norm(W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor, dtype: torch.dtype) -> Tensor:
    """n[N] = ‖W + s·B·A‖ by rows in float32, W read as `dtype`; K is split so that every processor reads W."""
    (N, K), (strides, kind) = W.shape, kind_of(W)
    key = A.device, dtype, A.dtype, A.shape[0], N, K, strides, kind, dtype_of(s), tuning.precision(dtype)
    return call("row_norm", norms, key, W, A, B, s)


def kind_of(W: Tensor | NF4Weight) -> tuple[tuple[int, int], tuple]:
    """(strides, what else the kernel is compiled for)."""
    if isinstance(W, NF4Weight):
        return (0, 0), kind_of_4_bits(W)
    return W.stride(), (0, W.dtype, False)  # type: ignore[return-value]


def norms(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    N: int,
    K: int,
    strides: tuple[int, int],
    kind: Kind,
    of_s: torch.dtype | None,
    precision: str,
) -> Callable[..., Tensor]:
    """run(W, A, B, s): equation 11 with this tile."""
    four_bits = {"enable_fp_fusion": False} if kind[0] else {}  # absmax's product and its sum are rounded apart
    launch = Launch(
        row_norm_kernel, tile.options() | four_bits, R=R, DTYPE=getattr(tl, dtype_name(dtype)), BLOCKSIZE=kind[0],
        PRECISION=precision, BM=tile.rows, BK=tile.columns, BR=tuning.padded_rank(R),
    )  # fmt: skip
    programs = -(-N // tile.rows)
    count, part_columns = tuning.splits(K, max(256, tile.columns), programs, 2 * tuning.gpu(device).processors)

    def run(W: Tensor | NF4Weight, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
        parts = new_parts(count, N, dtype=torch.float32, device=device)
        of_W = (None, W.codes, *tables(W)) if isinstance(W, NF4Weight) else (W, *[None] * 6)
        launch((programs, count), *of_W, A, B, parts, s, N, K, *strides, part_columns)
        return sum_parts((parts, count, torch.float32))[0].sqrt_()  # type: ignore[union-attr]

    return run
