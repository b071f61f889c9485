"""Quantise and dequantise in one launch each, to the bytes of PyTorch's operations."""

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...nf4.tables import dynamic_map
from ...nf4.weight import NESTED_BLOCKSIZE
from ...plan import use_backend
from ..torch import nf4 as pytorch
from ..torch.nf4 import mean_absmax, refuse
from . import extension
from .extension import DTYPES, C, descriptor, stream, values


def why_not(t: Tensor) -> str | None:
    """None where tensors like `t` can be quantised and dequantised here, otherwise the reason that they cannot."""
    return extension.why_not(t.device, use_backend.current)


def dequantize(w: NF4Weight, out: Tensor) -> None:
    """Equations 7 and 8: W's elements, in order, into the rows of out[rows, columns]."""
    if out.dtype not in DTYPES:  # float64
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        dequantize(w, wide)
        out.copy_(wide)
        return
    with torch.cuda.device_of(out):
        C.nf4_dequantize(descriptor(w, *out.shape), out.data_ptr(), out.stride(0), DTYPES[out.dtype], stream(out))


def quantize(weight: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> NF4Weight:
    """The nearest codes of weight/absmax. Raises ValueError for NaN and inf, naming the first position."""
    flat = weight.detach().reshape(-1)
    n, device = flat.numel(), weight.device
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=device)
    w = NF4Weight(codes, absmax, None, None, None, weight.shape, weight.dtype, blocksize, quant_type)
    if n == 0:
        return pytorch.quantize(weight, quant_type, blocksize, double_quant)
    first_bad = torch.full((), torch.iinfo(torch.int64).max, device=device)
    with torch.cuda.device_of(flat):
        C.nf4_quantize(
            flat.data_ptr(), n, DTYPES[flat.dtype], blocksize, values(quant_type), codes.data_ptr(), absmax.data_ptr(),
            first_bad.data_ptr(), stream(flat),
        )  # fmt: skip
    if (position := int(first_bad)) < n:
        refuse(w, flat[position : position + 1].float(), position)
    return _nest(w) if double_quant else w


def _nest(w: NF4Weight) -> NF4Weight:
    """absmax in 8 bits."""
    blocks, device = len(w.absmax), w.device
    offset, nested_map = mean_absmax(w.absmax).to(device), dynamic_map().to(device, copy=True)
    quantized = torch.empty(blocks, dtype=torch.uint8, device=device)
    nested = torch.empty(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32, device=device)
    with torch.cuda.device_of(nested):
        C.nf4_quantize_absmax(
            w.absmax.data_ptr(), blocks, offset.data_ptr(), nested_map.data_ptr(), quantized.data_ptr(), nested.data_ptr(),
            stream(nested),
        )  # fmt: skip
    return w.with_tensors(absmax=quantized, nested_absmax=nested, nested_map=nested_map, nested_offset=offset)
