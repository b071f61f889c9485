"""keep(seed, row, column): the dropout mask as a pure function, the same bits in every backend and for any tiling.

A mask is never stored: the backward pass computes it again from the 64-bit seed. Eight neighbouring columns share one
Philox4x32-7 block (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    counter = (column // 8, row, offset mod 2^32, offset // 2^32)      key = (seed mod 2^32, seed // 2^32)

The four 32-bit words of the block are eight 16-bit lanes, the low half of a word before its high half. Column `k` is kept
where lane `k % 8` >= threshold(p) = round(65536 p). Kept values are scaled by 1 / (1 - p̂) with p̂ = threshold / 65536,
so that the expectation is exact.

Here the mask is PyTorch operations, on any device; on a CPU csrc/cpu/dropout.cpp makes the same bits in a seventh of the time.
"""

import torch
from torch import Tensor

from . import cpu_extension
from .dtypes import dtype_name
from .scratch import scratch, slices

PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85  # key increments
PHILOX_ROUNDS = 7
LANES = 8  # columns per Philox block
LANE_RANGE = 1 << 16
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """round(65536 p): a lane below it is dropped."""
    return round(p * LANE_RANGE)


def keep_scale(p: float) -> float:
    """1 / (1 - p̂), the factor of kept values; 0 where everything is dropped."""
    kept = LANE_RANGE - threshold(p)
    return LANE_RANGE / kept if kept else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """An int64 0-d tensor on `device` from torch's generator of that device: no synchronisation, capturable in a graph,
    and replayed by `torch.utils.checkpoint`, which restores the generator's state.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """`seed` as an int64 0-d tensor on `device`. Raises TypeError or ValueError for anything else."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed: got a {seed.dtype} tensor of shape {tuple(seed.shape)}, expected one int64 value; "
                "use torch.tensor(seed, dtype=torch.int64)"
            )
        if seed.device != device:
            raise ValueError(f"seed: got a tensor on {seed.device}, expected it on {device}; use seed.to({str(device)!r})")
        return seed.detach().reshape(())
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, expected None, an int or an int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected a signed 64-bit integer; use seed % 2**63")
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_p(p: float, name: str = "dropout_p") -> None:
    """Raise unless p is a number in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: got {type(p).__name__}, expected a float")
    if not 0.0 <= p <= 1.0:  # NaN fails too
        raise ValueError(f"{name}: got {p}, expected a probability in [0, 1]")


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, scratch: Tensor, rounds: int = PHILOX_ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of int64 counter words that broadcast to scratch[6, ...]: four of its tensors, whose low halves are the words.

    A product of two 32-bit words wraps in int64 but keeps all of its 64 bits; only what is multiplied next needs a clear upper
    half. In the first two rounds rows, columns and offsets hardly mix yet, and broadcasting keeps the words that small. The
    others run in place: fresh memory for each operation would cost more than the arithmetic.
    """
    c0, c1, c2, c3 = counter
    steps = numbers(0, rounds, seed.device)
    keys = list(zip((seed + steps * PHILOX_W0).unbind(), ((seed >> 32) + steps * PHILOX_W1).unbind(), strict=True))
    for k0, k1 in keys[:2]:
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1
        c0, c1, c2, c3 = ((p1 >> 32) ^ (c1 ^ k0)) & _LOW, p1, ((p0 >> 32) ^ (c3 ^ k1)) & _LOW, p0
    c0, c1, c2, c3 = (word.copy_(small) for word, small in zip(scratch[:4], (c0, c1, c2, c3), strict=True))
    p0, p1 = scratch[4:]
    for k0, k1 in keys[2:]:
        torch.mul(c0, PHILOX_M0, out=p0)
        torch.mul(c2, PHILOX_M1, out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, p1 = p1, c1
        c3, p0 = p0, c3
    return c0, c1, c2, c3


def numbers(start: int, stop: int, device: torch.device) -> Tensor:
    """start : stop as int64 values; a compiler for GPUs takes a multiple of an arange for an index, which has 32 bits."""
    return torch.arange(start, stop, device=device) | 0


def lanes(rows: slice | Tensor, K: int, seed: Tensor, offset: int) -> Tensor:
    """The lane of each row and column, less 32768: int16[rows, K]."""
    device = seed.device
    row = (numbers(rows.start, rows.stop, device) if isinstance(rows, slice) else rows)[:, None]
    column, M = numbers(0, -(-K // LANES), device), len(row)
    offset_low, offset_high = (torch.full((), half, device=device) for half in (offset & _LOW, offset >> 32))
    work = scratch("philox", 6 * M * len(column), torch.int64, seed).view(6, M, len(column))
    words = scratch("words", 4 * M * len(column), torch.int32, seed).view(M, len(column), 4)
    for i, word in enumerate(philox((column, row, offset_low, offset_high), seed, work)):
        words[..., i] = word  # its low half
    words.bitwise_xor_(-0x7FFF8000)  # flips bits 15 and 31: signed 16-bit lanes then compare as unsigned ones
    return words.view(torch.int16).flatten(1)[:, :K]


class KeepRows:
    """keep(seed, row, column) for rows in a slice or in a tensor of their numbers: [rows, K] ones and zeros."""

    def __init__(self, K: int, p: float, seed: Tensor, *, offset: int = 0, dtype: torch.dtype = torch.bool):
        self.K, self.threshold, self.seed, self.offset, self.dtype = K, threshold(p), seed, offset, dtype

    def __call__(self, rows: slice | Tensor) -> Tensor:
        M = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        keep = scratch("keep", M * self.K, self.dtype, self.seed).view(M, self.K)
        if cpu_extension.takes(self.seed, None if isinstance(rows, slice) else rows):
            about = self.K, self.threshold, self.seed.item(), self.offset, torch.get_num_threads()
            for at, first, number in runs(rows):
                where = keep.data_ptr() + at * self.K * self.dtype.itemsize
                cpu_extension.extension.keep_rows(where, dtype_name(self.dtype), first, number, *about)
            return keep
        if self.threshold == LANE_RANGE:  # the one threshold that int16 cannot hold
            return keep.zero_()
        return torch.ge(lanes(rows, self.K, self.seed, self.offset), self.threshold - LANE_RANGE // 2, out=keep)


def runs(rows: slice | Tensor) -> list[tuple[int, int, int]]:
    """(place, first row, number) of each run of consecutive rows: those of a sequence lie together."""
    if isinstance(rows, slice):
        return [(0, rows.start, rows.stop - rows.start)]
    ends = [*((rows[1:] - rows[:-1] != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    starts = [0, *ends[:-1]]
    return [(a, first, b - a) for a, b, first in zip(starts, ends, rows[starts].tolist(), strict=True)] if len(rows) else []


def dropout_mask(
    M: int, K: int, p: float, seed: int | Tensor, *, offset: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """keep(seed, row, column) for M rows and K columns: bool[M, K], True where the value is kept.

    `lora_linear(x, …, dropout_p=p, seed=seed)` with x of M rows uses exactly this mask, with offset 0; kept values are
    scaled by `keep_scale(p)`. `offset`, below 2^64, gives independent masks from one seed. `device` defaults to the seed's,
    or the CPU. Raises ValueError for p outside [0, 1] and M above 2^32, where row counters would repeat.
    """
    check_p(p, "p")
    if not 0 <= M <= 1 << 32 or K < 0:
        raise ValueError(f"M, K: got {M}, {K}, expected 0 <= M <= 2**32 and K >= 0")
    if not 0 <= offset < 1 << 64:
        raise ValueError(f"offset: got {offset}, expected an unsigned 64-bit integer")
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    seed = as_seed(seed.to(device) if isinstance(seed, Tensor) else seed, torch.empty(0, device=device).device)
    keep = torch.empty(M, K, dtype=torch.bool, device=device)
    keep_rows = KeepRows(K, p, seed, offset=offset)
    for rows in row_chunks(M, K, keep.device):
        keep[rows] = keep_rows(rows)
    return keep


def drop(v: Tensor, p: float, seed: Tensor, offset: int = 0, *, out: Tensor | None = None) -> Tensor:
    """v[M, K]·keep / (1 - p̂) of a chunk of rows, written to `out`, which may be v, or to fresh memory; float32 or float64."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    if cpu_extension.takes(v) and v.stride(1) == 1:
        cpu_extension.extension.drop_rows(
            out.data_ptr(), v.data_ptr(), v.stride(0), v.dtype.itemsize, *v.shape,
            threshold(p), keep_scale(p), seed.item(), offset, torch.get_num_threads(),
        )  # fmt: skip
        return out
    keep = KeepRows(v.shape[1], p, seed, offset=offset, dtype=v.dtype)(slice(0, v.shape[0]))
    return torch.mul(v, keep.mul_(keep_scale(p)), out=out)


def chunk_elements(device: torch.device) -> int:
    """About how many elements the work on a chunk of rows reads: on a CPU so few that they stay in its cache."""
    return 1 << (20 if device.type == "cpu" else 26)


def row_chunks(M: int, width: int, device: torch.device) -> list[slice]:
    """Slices of M rows, each of about `chunk_elements`."""
    return slices(M, max(1, chunk_elements(device) // max(1, width)))
