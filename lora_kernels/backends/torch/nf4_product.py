"""Products of few tokens with a 4-bit weight on a CPU: csrc/cpu multiplies by the codes' values while they are in registers.

4096 x 4096 in float32 on two threads of a CPU with AVX2: one token takes 2.2 ms, 16 take 8.0; 17, decoded first, 17.0.
"""

import torch
from torch import Tensor

from ... import cpu_extension
from ...dtypes import dtype_name
from ...nf4 import NF4Weight
from .nf4 import for_extension, one_tile

FEW = 16  # tokens
GROUP = 64  # columns that it takes at a time


def linear(x: Tensor, w: NF4Weight, c: Tensor | None) -> Tensor:
    """x·Wᵀ + c over a small matrix W."""
    if len(x) <= FEW:
        y = x.new_zeros(len(x), w.shape[0]) if c is None else c.expand(len(x), -1).clone()
        if added(y, x, w):
            return y
    return torch.nn.functional.linear(x, one_tile(w, x.dtype), c)


def added(y: Tensor, x: Tensor, w: NF4Weight) -> bool:
    """y[M, N] += x·Wᵀ, W rounded to x's dtype, which is y's too; False, and nothing, where csrc/cpu cannot."""
    fits = len(x) <= FEW and x.dtype == y.dtype != torch.float64 and x.stride(1) == y.stride(1) == 1
    if not fits or w.blocksize % GROUP or w.shape[1] % w.blocksize or not cpu_extension.takes(x, y):
        return False
    if (weight := for_extension(w)) is None:
        return False
    about = x.data_ptr(), x.stride(0), len(x), *w.shape, dtype_name(x.dtype), y.data_ptr(), y.stride(0)
    cpu_extension.extension.nf4_product(weight, *about, torch.get_num_threads())
    return True
