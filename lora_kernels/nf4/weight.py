"""NF4Weight: a weight in bitsandbytes' 4-bit storage.

    7  W = table[code]·absmax            8  absmax = map[q]·nested_absmax + nested_offset     (nested, "double quantisation")

The weight is flattened row by row; blocks of `blocksize` elements run over rows' ends and share one absmax. Element 2i is the
high nibble of byte i, 2i+1 the low one. Nested, blocks of 256 absmax share one nested_absmax. Each product and the sum of 8
is rounded to float32 by itself, then W once to its dtype: bit for bit what bitsandbytes 0.50 computes on a CPU.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import plan
from ..dtypes import FLOATS
from .storage import as_bytes
from .tables import QUANT_TYPES, code_values

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
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

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """W[shape] rounded once to `dtype` (bf16, fp16, fp32 or fp64; by default out's, else the quantised weight's).

        out: a tensor of W's shape on its device, whose last dimension may be a part of longer rows; it is written and returned.
        """
        self.check()
        wanted = (self.dtype if out is None else out.dtype) if dtype is None else dtype
        if wanted not in FLOATS:
            raise TypeError(f"dtype: got {wanted}, expected bfloat16, float16, float32 or float64")
        if out is None:
            out = self.codes.new_empty(self.shape, dtype=wanted)
        elif out.shape != self.shape or out.device != self.device or out.dtype != wanted:
            raise ValueError(
                f"out: got {out.dtype}{list(out.shape)} on {out.device}, expected {wanted}{list(self.shape)} on {self.device}"
            )
        if self.device.type == "meta" or out.numel() == 0:
            return out
        # Backends write rows that may lie apart, each of adjacent elements; what is not such rows goes by way of a copy.
        rows = out.view(1, -1) if out.is_contiguous() else out
        if rows.ndim != 2 or rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
            return out.copy_(self.dequantize(wanted))
        next(m for m in plan.modules("nf4") if m.why_not(self.codes) is None).dequantize(self, rows)
        return out

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
        state = getattr(codes, "quant_state", None) if quant_state is None else quant_state
        if not isinstance(codes, Tensor) or state is None:
            raise TypeError(
                f"codes: got {type(codes).__name__} without a quant_state, expected a quantised Params4bit, or codes and their "
                "QuantState; a Linear4bit is quantised by moving it to a device"
            )
        if getattr(state, "packing_format_for_cpu", False):
            return _unpack_for_cpu(codes, state)
        nested = state.state2 if state.nested else None
        if nested is not None and nested.blocksize != NESTED_BLOCKSIZE:
            raise ValueError(f"quant_state: got nested blocks of {nested.blocksize}, expected {NESTED_BLOCKSIZE}")
        w = cls(
            as_bytes(codes),
            state.absmax if nested is not None else state.absmax.float(),
            None if nested is None else nested.absmax,
            None if nested is None else nested.code,
            None if nested is None else state.offset.reshape(()),
            torch.Size(state.shape),
            state.dtype,
            state.blocksize,
            state.quant_type,
        )
        w.check()
        return w

    def to_bnb(self) -> tuple[Tensor, Any]:
        """(codes[(n+1)//2, 1], quant_state) for bitsandbytes' functions; bytes are shared. ImportError without bitsandbytes."""
        from bitsandbytes.functional import QuantState

        state2 = None
        if self.nested:
            state2 = QuantState(self.nested_absmax, code=self.nested_map, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
        state = QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=code_values(self.quant_type, self.device).clone(),  # a tensor of its own: writers refuse shared ones
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.nested_offset,
            state2=state2,
        )
        return self.codes[:, None], state


def _unpack_for_cpu(codes: Tensor, state: Any) -> NF4Weight:
    """The codes in rows again, where bitsandbytes has regrouped them for its AVX512 kernel; absmax as that kernel reads it."""
    warnings.warn(
        "bitsandbytes repacked this weight for its CPU kernel in evaluation and rounded its absmax to bfloat16; "
        "that is what is taken over, in a copy. Convert a model before its first evaluation to share its bytes",
        stacklevel=3,
    )
    N, K = state.shape
    group = codes.detach().as_subclass(Tensor).view(-1, 32)  # bytes of 32 elements in the low and 32 in the high nibbles
    values = torch.cat([group & 15, group >> 4], 1).view(N // 32, K // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    absmax = state.absmax.T.reshape(-1).float()
    packed = (values[:, 0] << 4) | values[:, 1]
    shape, dtype = torch.Size(state.shape), state.original_dtype
    return NF4Weight(packed, absmax, None, None, None, shape, dtype, state.blocksize, state.quant_type)
