"""NF4Weight: a weight in bitsandbytes' 4-bit storage, and its exact dequantisation and quantisation.

    7  W = table[code]·absmax            8  absmax = map[q]·nested_absmax + nested_offset     (nested, "double quantisation")

The weight is flattened row by row; blocks of `blocksize` elements run over rows' ends and share one absmax. Element 2i is the
high nibble of byte i, 2i+1 the low one. Nested, blocks of 256 absmax share one nested_absmax. Each product and the sum of 8
is rounded to float32 by itself, then W once to its dtype: bit for bit what bitsandbytes 0.50 computes on a CPU.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..scratch import scratch, slices
from .codec import (
    NESTED_BLOCKSIZE,
    absmax_of,
    chunk_size,
    chunks,
    decode_into,
    decoded_by_extension,
    encode,
    nest,
    packed_values,
    tile_size,
)
from .tables import QUANT_TYPES

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
        from .state_dict import from_bnb

        return from_bnb(codes, quant_state)

    def to_bnb(self) -> tuple[Tensor, Any]:
        """(codes[(n+1)//2, 1], quant_state) for bitsandbytes' functions; bytes are shared."""
        from .state_dict import to_bnb

        return to_bnb(self)


def _kernels(t: Tensor, function: str) -> ModuleType | None:
    """The backend with a kernel `function` for tensors like `t`, to the same bits; None for the PyTorch operations here."""
    if t.device.type != "cuda" or t.numel() == 0:
        return None
    from ..plan import nf4_kernels  # above this file: only a GPU's tensors come there

    return nf4_kernels(t, function)


# ---- dequantise ----


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """W = table[code]·absmax, rounded once to `dtype` (bf16, fp16, fp32 or fp64; by default out's, else w's).

    out: a tensor of w's shape on its device, whose last dimension may be a part of longer rows; it is written and returned.
    """
    w.check()
    wanted = (w.dtype if out is None else out.dtype) if dtype is None else dtype
    if wanted not in (*DTYPES, torch.float64):
        raise TypeError(f"dtype: got {wanted}, expected bfloat16, float16, float32 or float64")
    if out is None:
        out = w.codes.new_empty(w.shape, dtype=wanted)
    elif out.shape != w.shape or out.device != w.device or out.dtype != wanted:
        raise ValueError(
            f"out: got {out.dtype}{list(out.shape)} on {out.device}, expected {wanted}{list(w.shape)} on {w.device}"
        )
    if w.device.type == "meta":
        return out
    if kernels := _kernels(w.codes, "nf4_dequantize"):
        return kernels.nf4_dequantize(w, out=out)
    if out.is_contiguous():
        flat = out.view(-1)
        if not decoded_by_extension(flat[None], w, 0):  # at once: 1.8 ms for 4096 x 4096, in chunks 2.4
            for start, stop in chunks(w):
                decode_into(flat[start:stop], w, start, stop)
        return out
    rows = out.view(-1, w.shape[-1]) if out.ndim != 2 else out
    if not decoded_by_extension(rows, w, 0, w.shape[-1]):
        for where, tile in tiles(w, out.dtype, torch.float32):
            rows[where] = tile
    return out


def tiles(w: NF4Weight, dtype: torch.dtype, work: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, W[rows] rounded to `dtype`, held in `work`), a few hundred rows at a time; a tile lives until the next one."""
    N, K = _matrix(w)
    for rows in slices(N, max(1, tile_size(w) // max(K, 1))):
        tile = scratch("nf4 tile", (rows.stop - rows.start) * K, work, w.codes)
        for start, stop in chunks(w, rows.start * K, rows.stop * K):
            part = tile[start - rows.start * K : stop - rows.start * K]
            if work == dtype:
                decode_into(part, w, start, stop)
            else:
                rounded = scratch("nf4 rounded", stop - start, dtype, w.codes)
                decode_into(rounded, w, start, stop)
                part.copy_(rounded)
        yield rows, tile.view(-1, K)


def column_tiles(w: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, W[:, columns] in `dtype`), some 64 columns at a time, for a matrix whose blocks do not cross rows.

    A product dy·W is complete in such a tile: it is rounded once, where a sum over tiles of rows would be rounded with each.
    """
    N, K = _matrix(w)
    width = max(32, 1 << (max(1, tile_size(w) // max(N, 1)).bit_length() - 1))
    per_block = min(width, w.blocksize)
    packed, row_step = w.codes.view(N, K // 2), max(1, chunk_size(w) // width)
    for columns in slices(K, width):
        count = columns.stop - columns.start
        tile = scratch("nf4 tile", N * count, dtype, w.codes).view(N, count)
        if decoded_by_extension(tile, w, columns.start, K):
            yield columns, tile
            continue
        for rows in slices(N, row_step):
            part = packed[rows, columns.start // 2 : columns.stop // 2]
            values = packed_values(w, part, scratch("nf4 values", part.numel(), torch.int64, w.codes))
            row = torch.arange(rows.start, rows.stop, device=w.device)[:, None]
            block = (row * K + torch.arange(columns.start, columns.stop, per_block, device=w.device)) // w.blocksize
            values = values.view(-1, per_block).mul_(absmax_of(w, block.flatten())[:, None])
            tile[rows] = values.view(-1, count)
        yield columns, tile


def _matrix(w: NF4Weight) -> tuple[int, int]:
    """(rows, row length)."""
    K = w.shape[-1]
    return w.numel() // K if K else 0, K


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
    if kernels := _kernels(weight, "nf4_quantize"):
        return kernels.nf4_quantize(weight, quant_type, blocksize, double_quant)
    n = weight.numel()
    codes = weight.new_empty((n + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(-(-n // blocksize), dtype=torch.float32)
    w = NF4Weight(codes, absmax, None, None, None, weight.shape, weight.dtype, blocksize, quant_type)
    if weight.device.type != "meta":
        flat = weight.detach().reshape(-1)
        for start, stop in chunks(w):
            encode(w, flat, start, stop)
    if not double_quant:
        return w
    return NF4Weight(codes, *nest(absmax), weight.shape, weight.dtype, blocksize, quant_type)
