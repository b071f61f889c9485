"""4-bit weights by PyTorch operations, a chunk that stays in a CPU's cache at a time, and by csrc/cpu where it was built.

Codes and absmax from values and back, exactly as bitsandbytes on a CPU.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import cpu_extension
from ...dtypes import dtype_name
from ...nf4 import NF4Weight
from ...nf4.tables import CELLS, code_values, dynamic_map, nested_bins, nf4_cells, pair_table, thresholds
from ...nf4.weight import NESTED_BLOCKSIZE
from ...scratch import scratch, slices

CHUNK = 1 << 18  # elements decoded or encoded at a time: their scratch stays in a CPU's cache
GPU_CHUNK = 1 << 26
# Elements of a tile of W: 8 MiB of float32, the most that is kept. With half of it dy·W of 17, 32 and 64 tokens and 4096 x 4096
# takes 51, 60 and 60 ms on one thread for 39, 50 and 54; W decoded into memory that is there already, 37, 39 and 56.
TILE = 1 << 21
FRESH = 1 << 14  # elements for which fresh memory costs less than the way to memory that is kept


def why_not(t: Tensor) -> None:
    """None: PyTorch takes any tensor."""


def dequantize(w: NF4Weight, out: Tensor) -> None:
    """W's elements, in order, into the rows of out[rows, columns]."""
    rows, columns = out.shape
    if decoded_by_extension(out, w, 0, columns):  # at once: 1.8 ms for 4096 x 4096, in chunks 2.4
        return
    if rows == 1:
        for start, stop in chunks(w):
            decode_into(out[0, start:stop], w, start, stop)
        return
    for where, tile in tiles(w, out.dtype, torch.float32):
        out[where] = tile
        del tile


def quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> NF4Weight:
    """The nearest codes of weight/absmax."""
    n, flat = weight.numel(), weight.detach().reshape(-1)
    codes = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    w = NF4Weight(codes, absmax, None, None, None, weight.shape, weight.dtype, blocksize, quant_type)
    if weight.device.type != "meta":
        for start, stop in chunks(w):
            encode(w, flat, start, stop)
    if not double_quant:
        return w
    return NF4Weight(codes, *nest(absmax), weight.shape, weight.dtype, blocksize, quant_type)


# ---- pieces of a weight ----


def tile_size(device: torch.device) -> int:
    return TILE if device.type == "cpu" else GPU_CHUNK


def chunk_size(w: NF4Weight) -> int:
    return CHUNK if w.device.type == "cpu" else GPU_CHUNK


def chunks(w: NF4Weight, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of elements that cover start:stop and end at block boundaries."""
    step, stop = chunk_size(w), w.numel() if stop is None else stop
    while start < stop:
        end = min(stop, start - start % w.blocksize + step)
        yield start, end
        start = end


def tiles(w: NF4Weight, dtype: torch.dtype, work: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W[rows] rounded to `dtype`, held in `work`), a few hundred rows at a time. The caller lets go of each tile."""
    N, K = _matrix(w)
    for rows in slices(N, max(1, tile_size(w.device) // max(K, 1))):
        yield rows, _tile(w, rows, dtype, work).view(-1, K)


def _tile(w: NF4Weight, rows: slice, dtype: torch.dtype, work: torch.dtype) -> Tensor:
    first, last = rows.start * w.shape[-1], rows.stop * w.shape[-1]
    tile = scratch("nf4 tile", last - first, work, w.codes)
    for start, stop in chunks(w, first, last):
        if work == dtype:
            decode_into(tile[start - first : stop - first], w, start, stop)
        else:
            rounded = scratch("nf4 rounded", stop - start, dtype, w.codes)
            decode_into(rounded, w, start, stop)
            tile[start - first : stop - first] = rounded
            del rounded
    return tile


def one_tile(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The whole of a small matrix W in `dtype`."""
    size = w.numel()
    if size <= FRESH:
        tile = torch.empty(w.shape, dtype=dtype, device=w.device)
    else:
        tile = scratch("nf4 tile", size, dtype, w.codes).view(w.shape)
    if not decoded_by_extension(tile, w, 0, w.shape[1]):
        decode_into(tile.view(-1), w, 0, size)
    return tile


def column_tiles(w: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, W[:, columns] in `dtype`), some 64 columns at a time, for a matrix whose blocks do not cross rows. As `tiles`.

    A product dy·W is complete in such a tile: it is rounded once, where a sum over tiles of rows would be rounded with each.
    """
    N, K = _matrix(w)
    width = max(32, 1 << (max(1, tile_size(w.device) // max(N, 1)).bit_length() - 1))
    per_block = min(width, w.blocksize)
    packed, row_step = w.codes.view(N, K // 2), max(1, chunk_size(w) // width)
    for columns in slices(K, width):
        count = columns.stop - columns.start
        tile = scratch("nf4 tile", N * count, dtype, w.codes).view(N, count)
        decoded = decoded_by_extension(tile, w, columns.start, K)
        for rows in [] if decoded else slices(N, row_step):
            part = packed[rows, columns.start // 2 : columns.stop // 2]
            values = packed_values(w, part, scratch("nf4 values", part.numel(), torch.int64, w.codes))
            row = torch.arange(rows.start, rows.stop, device=w.device)[:, None]
            block = (row * K + torch.arange(columns.start, columns.stop, per_block, device=w.device)) // w.blocksize
            values = values.view(-1, per_block).mul_(absmax_of(w, block.flatten())[:, None])
            tile[rows] = values.view(-1, count)
            del values
        yield columns, tile
        del tile


def _matrix(w: NF4Weight) -> tuple[int, int]:
    """(rows, row length)."""
    K = w.shape[-1]
    return w.numel() // K if K else 0, K


# ---- codes to values ----


def decoded_by_extension(out: Tensor, w: NF4Weight, start: int, step: int = 0) -> bool:
    """out[i, j] = element start + i·step + j, rounded to out's dtype, by csrc/cpu; False, and nothing, where it cannot."""
    weight = for_extension(w) if cpu_extension.takes(out) and out.stride(1) == 1 else None
    if weight is None:
        return False
    size = out.stride(0), *out.shape
    cpu_extension.extension.nf4_decode(
        weight, out.data_ptr(), dtype_name(out.dtype), *size, start, step, torch.get_num_threads()
    )
    return True


def for_extension(w: NF4Weight) -> Any:
    """The weight as csrc/cpu reads it; None where it cannot."""
    tensors = w.codes, w.absmax, w.nested_absmax, w.nested_map, w.nested_offset
    if not cpu_extension.takes(*tensors):
        return None
    addresses = [0 if t is None else t.data_ptr() if t.is_contiguous() else None for t in tensors]
    if None in addresses:
        return None
    return cpu_extension.extension.Weight(*addresses, code_values(w.quant_type).data_ptr(), w.blocksize)


def decode_into(out: Tensor, w: NF4Weight, start: int, stop: int) -> None:
    """The elements start:stop, rounded to out's dtype; whole blocks of float32 are written where they belong at once."""
    if decoded_by_extension(out[None], w, start):
        return
    blocks = start % w.blocksize == 0 and stop % w.blocksize == 0
    if blocks and out.dtype == torch.float32 and out.storage_offset() % 2 == 0:
        values = packed_values(w, w.codes[start // 2 : stop // 2], out.view(torch.int64))
        values.view(-1, w.blocksize).mul_(block_absmax(w, start // w.blocksize, stop // w.blocksize)[:, None])
    else:
        out.copy_(decode(w, start, stop))


def decode(w: NF4Weight, start: int, stop: int) -> Tensor:
    """float32 values of the elements start:stop, in scratch; whole blocks are decoded."""
    block, n = start // w.blocksize, w.numel()
    first, last = block * w.blocksize, min(n, -(-stop // w.blocksize) * w.blocksize)
    packed = w.codes[first // 2 : (last + 1) // 2]
    values = packed_values(w, packed, scratch("nf4 values", len(packed), torch.int64, w.codes))
    absmax = block_absmax(w, block, -(-last // w.blocksize))
    whole = (last - first) // w.blocksize
    values[: whole * w.blocksize].view(-1, w.blocksize).mul_(absmax[:whole, None])
    if len(absmax) > whole:
        values[whole * w.blocksize :].mul_(absmax[whole])
    return values[start - first : stop - first]


def packed_values(w: NF4Weight, packed: Tensor, pairs: Tensor) -> Tensor:
    """float32 values of the codes in `packed` bytes, written to pairs (int64): a byte is one load from the table of pairs.

    A gather of single values takes 148 ms for 4096 x 4096 where this takes 9.
    """
    index = scratch("nf4 index", packed.numel(), torch.int32, w.codes)
    index.view(packed.shape).copy_(packed)
    return torch.index_select(pair_table(w.quant_type, w.device), 0, index, out=pairs).view(torch.float32)


def block_absmax(w: NF4Weight, start: int = 0, stop: int | None = None) -> Tensor:
    """float32 absmax of the blocks start:stop (equation 8 where nested)."""
    absmax = w.absmax[start:stop]
    if not w.nested:
        return absmax
    return _unnest(w, absmax, torch.arange(start, start + len(absmax), device=w.device))


def absmax_of(w: NF4Weight, block: Tensor) -> Tensor:
    """float32 absmax of the blocks with these numbers."""
    absmax = w.absmax[block]
    return _unnest(w, absmax, block) if w.nested else absmax


def _unnest(w: NF4Weight, q: Tensor, block: Tensor) -> Tensor:
    values = w.nested_map.index_select(0, q.int())  # type: ignore[union-attr]
    return values.mul_(w.nested_absmax[block // NESTED_BLOCKSIZE]).add_(w.nested_offset)  # type: ignore[index, arg-type]


# ---- values to codes ----


def encode(w: NF4Weight, flat: Tensor, start: int, stop: int) -> None:
    """Write codes and absmax of the elements start:stop, which start at a block.

    Whole blocks multiply by the reciprocal of absmax; the block that is cut off at the end divides by it, as bitsandbytes does.
    """
    size, bs = stop - start, w.blocksize
    v = scratch("nf4 values", size + size % 2, torch.float32, flat)
    v[:size] = flat[start:stop]
    whole = size - size % bs
    largest = w.absmax[start // bs : -(-stop // bs)]
    if whole:
        torch.linalg.vector_norm(v[:whole].view(-1, bs), float("inf"), 1, out=largest[: whole // bs])
    if whole < size:
        largest[-1] = v[whole:size].abs().amax().clamp(min=1e-38)
    if not largest.isfinite().all():
        refuse(w, v[:size], start)
    v[:whole].view(-1, bs).mul_((1.0 / largest[: whole // bs].clamp(min=1e-38))[:, None])
    if whole < size:
        v[whole:size].div_(largest[-1])
        v[size:] = 0
    q = _codes(w.quant_type, v.clamp_(-1, 1)).view(-1, 2)
    torch.bitwise_or(q[:, 0] << 4, q[:, 1], out=w.codes[start // 2 : (stop + 1) // 2])


def _codes(quant_type: str, v: Tensor) -> Tensor:
    """uint8 codes of values in [-1, 1]."""
    if quant_type == "fp4":
        bounds, order = thresholds("fp4", v.device)
        return order[torch.bucketize(v, bounds)]
    below, threshold = nf4_cells(v.device)
    cell = scratch("nf4 index", len(v), torch.int32, v)
    position = scratch("nf4 position", len(v), torch.float32, v)
    cell.copy_(torch.add(v, 1, out=position).mul_(CELLS / 2))
    torch.index_select(threshold, 0, cell, out=position)
    q = scratch("nf4 codes", len(v), torch.uint8, v)
    return torch.index_select(below, 0, cell, out=q).add_(v > position)


def refuse(w: NF4Weight, values: Tensor, start: int) -> None:
    """Raise ValueError for the first value that is not finite; values[0] is element `start` of the weight."""
    position = int((~values.isfinite()).nonzero()[0])
    index, rest = [], start + position
    for size in reversed(w.shape):
        index.append(rest % size)
        rest //= size
    raise ValueError(
        f"weight: got {values[position].item()} at {tuple(reversed(index))}, expected finite values; "
        "4 bits can hold neither NaN nor inf"
    )


def mean_absmax(absmax: Tensor) -> Tensor:
    """The mean, on the CPU, whose order of summation is bitsandbytes'."""
    mean = absmax.cpu().mean() if len(absmax) else torch.zeros(())
    if not mean.isfinite():
        raise ValueError("weight: the mean of its absmax overflows float32; use double_quant=False")
    return mean


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(uint8 absmax - mean in blocks of 256, their float32 absmax, the map, the mean) of float32 absmax, on its device."""
    blocks, on = len(absmax), absmax.device
    if on.type == "meta":
        sizes = (-(-blocks // NESTED_BLOCKSIZE),), (256,), ()
        return absmax.to(torch.uint8), *(absmax.new_empty(size) for size in sizes)  # type: ignore[return-value]
    absmax = absmax.cpu()
    offset = mean_absmax(absmax)
    centred = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    largest = centred.abs().amax(1)
    scaled = (centred * (1 / largest)[:, None]).nan_to_num(-1.0).clamp(-1, 1)  # 0 / 0 has code 0, as -1
    bin_number = ((scaled + 1) * 0.5).mul(65535).add(0.5).long()  # for each float in [0, 1] the same as rounded once, by an fma
    q = nested_bins()[bin_number].view(-1)[:blocks]
    return q.to(on), largest.to(on), dynamic_map().to(on, copy=True), offset.to(on)
