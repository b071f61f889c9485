"""keep(seed, row, column) of lora_kernels.mask inside Triton kernels: the same bits in any tiling."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from ....mask import LANES, PHILOX_ROUNDS, threshold
from ..launch import Launch, kept
from ..tuning import ELEMENTWISE
from .tiles import load_tile, store_tile

_ROUNDS, _LANES = tl.constexpr(PHILOX_ROUNDS), tl.constexpr(LANES)


@triton.jit
def words_tile(seed, o_row, column, offset_low, offset_high, COLUMNS: tl.constexpr):
    """Philox's words of these rows and of COLUMNS columns from `column`, a multiple of 8: two of its lanes in each."""
    block = (tl.arange(0, COLUMNS // _LANES) + column // _LANES).to(tl.uint32)[None, :]
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox_impl(block, o_row.to(tl.uint32)[:, None], offset_low, offset_high, low, high, _ROUNDS)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))  # flattened: w0 w1 w2 w3


@triton.jit
def keep_tile(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    """keep(seed, row, column) as bool[rows, COLUMNS], for COLUMNS columns from `column`, a multiple of 8.

    OFFSET, the member's number in all but plain MLPs, is compiled in: as an argument its two words would be mixed by every
    program. A Philox block decides eight columns. Counter words stay a row or a column until a round mixes them, so two rounds
    are almost free. Lanes are compared at the top of their word: lane >= threshold is lane·2^16 > edge, with edge =
    threshold·2^16 - 1, and the high lane lies there already (the low bits below it change nothing).
    """
    edge = edge.to(tl.uint32, bitcast=True)
    offset_low, offset_high = tl.full([1, 1], OFFSET & 0xFFFFFFFF, tl.uint32), tl.full([1, 1], OFFSET >> 32, tl.uint32)
    words = words_tile(seed, o_row, column, offset_low, offset_high, COLUMNS)
    return tl.reshape(tl.join((words << 16) > edge, words > edge), (o_row.shape[0], COLUMNS))


@triton.jit(do_not_specialize=["M", "edge", "first_row"])
def drop_kernel(
    v, out, seed, edge, first_row, M, D, stride_v, stride_out, OFFSET: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out = v · keep, for v[M, D] whose first row is row `first_row` of the mask."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BD
    o_d = column + tl.arange(0, BD)
    b_v = load_tile(v, o_m, o_d, stride_v, M, D)
    keep = keep_tile(tl.load(seed), edge, first_row + o_m, column, OFFSET, BD)
    store_tile(out, tl.where(keep, b_v, 0.0), o_m, o_d, stride_out, M, D)


def drop(v: Tensor, p: float, seed: Tensor, offset: int = 0, *, first_row: int = 0, out: Tensor) -> Tensor:
    """out = v · keep, in out's dtype; `out` may be v itself."""
    M, D = v.shape
    grid = -(-M // ELEMENTWISE.rows), -(-D // ELEMENTWISE.columns)
    launch = drop_launch(v.dtype, out.dtype, D, v.stride(0), out.stride(0), offset)
    launch(grid, v, out, seed, edge(p), first_row, M, D, v.stride(0), out.stride(0))
    return out


@kept
def drop_launch(dtype: torch.dtype, out: torch.dtype, D: int, stride_v: int, stride_out: int, offset: int) -> Launch:
    """The launch of `drop` over tensors of this kind."""
    options = {"num_warps": ELEMENTWISE.warps}
    return Launch(drop_kernel, options, OFFSET=offset, BM=ELEMENTWISE.rows, BD=ELEMENTWISE.columns)


@functools.lru_cache
def drops(p: float) -> bool:
    """Whether any element is dropped: a p below 2^-17 rounds to threshold 0."""
    return threshold(p) > 0


def edge(p: float) -> int:
    """threshold·2^16 - 1 as the signed 32-bit integer of the same bits, so that every p is one kernel argument type."""
    bits = (threshold(p) << 16) - 1
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def mask_bits(M: int, K: int, p: float, seed: Tensor, offset: int = 0) -> Tensor:
    """The kernels' mask itself, as bool[M, K]: what tests compare with dropout_mask."""
    ones = torch.ones(M, K, dtype=torch.float32, device=seed.device)
    return drop(ones, p, seed, offset, out=ones) != 0
