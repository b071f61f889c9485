"""A 4-bit weight's values.

7  W = table[code]·absmax            8  absmax = map[q]·nested_absmax + nested_offset     (nested)
"""

import torch
from torch import Tensor

from ..nf4 import NF4Weight
from ..nf4.tables import code_values
from ..nf4.weight import NESTED_BLOCKSIZE


def dequantize(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    """W[shape]: every product and sum is rounded to float32 by itself, then W once to `dtype`."""
    codes = torch.stack([w.codes >> 4, w.codes & 15], 1).flatten()[: w.numel()].long()
    absmax = w.absmax
    if w.nested_absmax is not None and w.nested_map is not None and w.nested_offset is not None:
        scale = w.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(absmax)]
        absmax = w.nested_map[absmax.long()] * scale + w.nested_offset  # 8
    absmax = absmax.repeat_interleave(w.blocksize)[: w.numel()]
    return (code_values(w.quant_type, w.device)[codes] * absmax).to(dtype).view(w.shape)  # 7


def dense(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor:
    """A weight as its products read it."""
    return dequantize(weight, dtype) if isinstance(weight, NF4Weight) else weight
