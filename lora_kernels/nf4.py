"""NF4Weight: a weight in bitsandbytes' 4-bit storage, and its exact dequantisation and quantisation.

    7  W = table[code]·absmax            8  absmax = map[q]·nested_absmax + nested_offset     (nested, "double quantisation")

The weight is flattened row by row; blocks of `blocksize` elements run over rows' ends and share one absmax. Element 2i is the
high nibble of byte i, 2i+1 the low one. Nested, blocks of 256 absmax share one nested_absmax. Each product and the sum of 8
is rounded to float32 by itself, then W once to its dtype: bit for bit what bitsandbytes 0.50 computes on a CPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .nf4_tables import CELLS, QUANT_TYPES, dynamic_map, nested_bins, nf4_cells, pair_table, thresholds
from .scratch import scratch, slices

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK = 1 << 18  # elements decoded or encoded at a time: their scratch stays in a CPU's cache
GPU_CHUNK = 1 << 26
TILE = 1 << 20  # elements of a tile of rows of W


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A 4-bit weight, "nf4" or "fp4": frozen, on one device.

    codes: uint8[(n+1)//2]. absmax: float32[blocks], or nested: uint8[blocks] with nested_absmax float32[ceil(blocks/256)],
    nested_map float32[256] and nested_offset, a float32 0-d tensor. shape and dtype are those of the weight that was quantised.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    quant_type: str = "nf4"

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def numel(self) -> int:
        return self.shape.numel()

    def fields(self) -> tuple[Any, ...]:
        """All fields in order, the five tensors first: what `from_fields` takes."""
        tensors = self.codes, self.absmax, self.nested_absmax, self.nested_map, self.nested_offset
        return *tensors, self.shape, self.dtype, self.blocksize, self.quant_type

    @classmethod
    def from_fields(cls, values: Iterable[Any]) -> "NF4Weight":
        """The weight of `fields()`."""
        codes, absmax, nested_absmax, nested_map, nested_offset, shape, dtype, blocksize, quant_type = values
        size = torch.Size(shape)
        return cls(codes, absmax, nested_absmax, nested_map, nested_offset, size, dtype, blocksize, quant_type)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        names = (field.name for field in fields(self))
        return {name: value for name, value in zip(names, self.fields(), strict=True) if isinstance(value, Tensor)}

    def with_tensors(self, **tensors: Tensor | None) -> "NF4Weight":
        """The same weight with other tensors."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "NF4Weight":
        """The weight on `device`."""
        return self.with_tensors(**{name: t.to(device, non_blocking=non_blocking) for name, t in self.tensors().items()})

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W[shape] in `dtype`, by default that of the weight that was quantised."""
        return dequantize_nf4(self, dtype)

    def check(self) -> None:
        """Raise ValueError or TypeError unless the tensors have the sizes, dtypes and device that the format wants."""
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"quant_type: got {self.quant_type!r}, expected 'nf4' or 'fp4'")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize: got {self.blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}")
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype: got {self.dtype}, expected bfloat16, float16 or float32")
        n = self.numel()
        blocks = -(-n // self.blocksize)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": (((n + 1) // 2,), torch.uint8)}
        expected["absmax"] = ((blocks,), torch.uint8 if self.nested else torch.float32)
        if self.nested:
            expected["nested_absmax"] = ((-(-blocks // NESTED_BLOCKSIZE),), torch.float32)
            expected |= {"nested_map": ((256,), torch.float32), "nested_offset": ((), torch.float32)}
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name}: got {tensor.dtype}{list(tensor.shape)}, expected {dtype}{list(shape)} for a weight of shape "
                    f"{tuple(self.shape)} in blocks of {self.blocksize}; is the state truncated?"
                )
            if tensor.device != self.device:
                raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {self.device} as codes")

    @classmethod
    def from_bnb(cls, codes: Tensor, quant_state: Any = None) -> "NF4Weight":
        """The same weight from bitsandbytes' `Params4bit`, or packed codes of any storage dtype and a `QuantState`; bytes are
        shared, not copied. Raises ValueError or TypeError for a state that does not fit.
        """
        from .nf4_state import from_bnb

        return from_bnb(codes, quant_state)

    def to_bnb(self) -> tuple[Tensor, Any]:
        """(codes[(n+1)//2, 1], quant_state) for bitsandbytes' functions; bytes are shared."""
        from .nf4_state import to_bnb

        return to_bnb(self)


# ---- dequantise ----


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """W = table[code]·absmax, rounded once to `dtype` (bf16, fp16, fp32 or fp64; by default out's, else w's).

    out: a tensor of w's shape on its device, whose last dimension may be a part of longer rows; it is written and returned.
    """
    w.check()
    if out is None:
        out = w.codes.new_empty(w.shape, dtype=dtype or w.dtype)
    elif out.shape != w.shape or out.device != w.device or (dtype is not None and out.dtype != dtype):
        raise ValueError(
            f"out: got {out.dtype}{list(out.shape)} on {out.device}, expected {dtype or out.dtype}{list(w.shape)} on {w.device}"
        )
    if w.device.type == "meta":
        return out
    if out.is_contiguous():
        flat = out.view(-1)
        for start, stop in chunks(w):
            flat[start:stop] = _decode(w, start, stop)
        return out
    rows = out.view(-1, w.shape[-1]) if out.ndim != 2 else out
    for where, tile in tiles(w, out.dtype, torch.float32):
        rows[where] = tile
    return out


def tiles(w: NF4Weight, dtype: torch.dtype, work: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W[rows] rounded to `dtype`, held in `work`), a few hundred rows at a time; a tile lives until the next one."""
    N, K = _matrix(w)
    for rows in slices(N, max(1, _tile_size(w) // max(K, 1))):
        tile = scratch("nf4 tile", (rows.stop - rows.start) * K, work, w.codes)
        for start, stop in chunks(w, rows.start * K, rows.stop * K):
            part = _decode(w, start, stop)
            tile[start - rows.start * K : stop - rows.start * K] = part if work == dtype else part.to(dtype)
        yield rows, tile.view(-1, K)


def column_tiles(w: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, W[:, columns] in `dtype`), some 64 columns at a time, for a matrix whose blocks do not cross rows.

    A product dy·W is complete in such a tile: it is rounded once, where a sum over tiles of rows would be rounded with each.
    """
    N, K = _matrix(w)
    width = max(32, 1 << (max(1, _tile_size(w) // max(N, 1)).bit_length() - 1))
    per_block = min(width, w.blocksize)
    packed, row_step = w.codes.view(N, K // 2), max(1, _chunk_size(w) // width)
    for columns in slices(K, width):
        count = columns.stop - columns.start
        tile = scratch("nf4 tile", N * count, dtype, w.codes).view(N, count)
        for rows in slices(N, row_step):
            values = _values(w, packed[rows, columns.start // 2 : columns.stop // 2])
            row = torch.arange(rows.start, rows.stop, device=w.device)[:, None]
            block = (row * K + torch.arange(columns.start, columns.stop, per_block, device=w.device)) // w.blocksize
            values = values.view(-1, per_block).mul_(_absmax(w, block.flatten())[:, None])
            tile[rows] = values.view(-1, count)
        yield columns, tile


def _matrix(w: NF4Weight) -> tuple[int, int]:
    """(rows, row length)."""
    K = w.shape[-1]
    return w.numel() // K if K else 0, K


def _tile_size(w: NF4Weight) -> int:
    return TILE if w.device.type == "cpu" else GPU_CHUNK


def _chunk_size(w: NF4Weight) -> int:
    return CHUNK if w.device.type == "cpu" else GPU_CHUNK


def chunks(w: NF4Weight, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of elements that cover start:stop and end at block boundaries."""
    step, stop = _chunk_size(w), w.numel() if stop is None else stop
    while start < stop:
        end = min(stop, start - start % w.blocksize + step)
        yield start, end
        start = end


def _decode(w: NF4Weight, start: int, stop: int) -> Tensor:
    """float32 values of the elements start:stop, in scratch that the next call overwrites; whole blocks are decoded."""
    block, n = start // w.blocksize, w.numel()
    first, last = block * w.blocksize, min(n, -(-stop // w.blocksize) * w.blocksize)
    values = _values(w, w.codes[first // 2 : (last + 1) // 2])
    absmax = block_absmax(w, block, -(-last // w.blocksize))
    whole = (last - first) // w.blocksize
    values[: whole * w.blocksize].view(-1, w.blocksize).mul_(absmax[:whole, None])
    if len(absmax) > whole:
        values[whole * w.blocksize :].mul_(absmax[whole])
    return values[start - first : stop - first]


def _values(w: NF4Weight, packed: Tensor) -> Tensor:
    """float32 values of the codes in `packed` bytes, in scratch: a byte is one int64 load from the table of pairs.

    A gather of single values takes 148 ms for 4096 x 4096 where this takes 9.
    """
    index = scratch("nf4 index", packed.numel(), torch.int32, w.codes)
    index.view(packed.shape).copy_(packed)
    pairs = scratch("nf4 values", packed.numel(), torch.int64, w.codes)
    return torch.index_select(pair_table(w.quant_type, w.device), 0, index, out=pairs).view(torch.float32)


def block_absmax(w: NF4Weight, start: int = 0, stop: int | None = None) -> Tensor:
    """float32 absmax of the blocks start:stop (equation 8 where nested)."""
    absmax = w.absmax[start:stop]
    if not w.nested:
        return absmax
    return _unnest(w, absmax, torch.arange(start, start + len(absmax), device=w.device))


def _absmax(w: NF4Weight, block: Tensor) -> Tensor:
    """float32 absmax of the blocks with these numbers."""
    absmax = w.absmax[block]
    return _unnest(w, absmax, block) if w.nested else absmax


def _unnest(w: NF4Weight, q: Tensor, block: Tensor) -> Tensor:
    values = w.nested_map.index_select(0, q.int())  # type: ignore[union-attr]
    return values.mul_(w.nested_absmax[block // NESTED_BLOCKSIZE]).add_(w.nested_offset)  # type: ignore[index, arg-type]


# ---- quantise ----


@torch.no_grad()
def quantize_nf4(weight: Tensor, *, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """The nearest NF4 codes of weight/absmax for blocks of `blocksize`; double_quant stores absmax in 8 bits.

    weight: bf16, fp16 or fp32, any shape and device; it is read in chunks. On the meta device the result is there too.
    Raises TypeError for another dtype, ValueError for a blocksize that bitsandbytes does not have, and for NaN or inf, naming
    the first position.
    """
    return quantize(weight, "nf4", blocksize, double_quant)


def quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> NF4Weight:
    """`quantize_nf4` for "nf4" or "fp4"."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a torch.Tensor")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight: got dtype {weight.dtype}, expected bfloat16, float16 or float32")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize: got {blocksize}, expected one of {', '.join(map(str, BLOCKSIZES))}")
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    w = NF4Weight(codes, absmax, None, None, None, weight.shape, weight.dtype, blocksize, quant_type)
    if weight.device.type != "meta":
        flat = weight.detach().reshape(-1)
        for start, stop in chunks(w):
            _encode(w, flat, start, stop)
    return _nest(w) if double_quant else w


def _encode(w: NF4Weight, flat: Tensor, start: int, stop: int) -> None:
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
        _refuse(w, v[:size], start)
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


def _refuse(w: NF4Weight, values: Tensor, start: int) -> None:
    position = int((~values.isfinite()).nonzero()[0])
    index, rest = [], start + position
    for size in reversed(w.shape):
        index.append(rest % size)
        rest //= size
    raise ValueError(
        f"weight: got {values[position].item()} at {tuple(reversed(index))}, expected finite values; "
        "4 bits can hold neither NaN nor inf"
    )


def _nest(w: NF4Weight) -> NF4Weight:
    """absmax - mean in 8 bits, in blocks of 256: computed on the CPU, where its mean's order of summation is bitsandbytes'."""
    blocks = len(w.absmax)
    if w.device.type == "meta":
        nested = w.absmax.new_empty(-(-blocks // NESTED_BLOCKSIZE)), w.absmax.new_empty(256), w.absmax.new_empty(())
        return NF4Weight(w.codes, w.absmax.to(torch.uint8), *nested, w.shape, w.dtype, w.blocksize, w.quant_type)
    absmax = w.absmax.cpu()
    offset = absmax.mean() if blocks else torch.zeros(())
    if not offset.isfinite():
        raise ValueError("weight: the mean of its absmax overflows float32; use double_quant=False")
    centred = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    largest = centred.abs().amax(1)
    scaled = (centred * (1 / largest)[:, None]).nan_to_num(-1.0).clamp(-1, 1)
    bin_number = ((scaled + 1) * 0.5).double().mul(65535).add(0.5).float().long().clamp(0, 65535)  # one rounding, as fma
    q = nested_bins()[bin_number].masked_fill(largest[:, None] == 0, 0).view(-1)[:blocks]
    on = w.device
    nested_tensors = largest.to(on), dynamic_map().to(on, copy=True), offset.to(on)
    return NF4Weight(w.codes, q.to(on), *nested_tensors, w.shape, w.dtype, w.blocksize, w.quant_type)
