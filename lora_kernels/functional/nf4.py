"""quantize_nf4 and dequantize_nf4: weights to and from bitsandbytes' 4-bit storage, by the first backend that can."""

import torch
from torch import Tensor

from .. import plan
from ..nf4 import NF4Weight
from ..nf4.weight import BLOCKSIZES, DTYPES


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """W = table[code]·absmax, rounded once to `dtype` (bf16, fp16, fp32 or fp64; by default out's, else w's).

    out: a tensor of w's shape on its device, whose last dimension may be a part of longer rows; it is written and returned.
    """
    return w.dequantize(dtype, out)


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
    backend = next(m for m in plan.modules("nf4") if hasattr(m, "quantize") and m.why_not(weight) is None)
    return backend.quantize(weight, quant_type, blocksize, double_quant)
