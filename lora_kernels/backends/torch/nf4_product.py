"""Products of few tokens with a 4-bit weight on a CPU: csrc/cpu multiplies by the codes' values while they are in registers.

4096 x 4096 takes 3.8, 4.7 and 13.7 ms for 1, 4 and 16 tokens on one thread of a CPU with AVX2, in 16 bits up to 0.7 ms more.
For 17, 32, 48 and 64 tokens it takes 17, 26, 39 and 52 ms in float32 where tiles that are decoded first take 28, 31, 42 and 48,
in bfloat16 17, 28, 39 and 58 for 38, 48, 54 and 71: its tiles are widened. The two cross at the same place for 2048 x 2048.
"""

import torch
from torch import Tensor

from ... import cpu_extension
from ...dtypes import dtype_name
from ...nf4 import NF4Weight
from ..products import product_dtype
from .nf4 import for_extension, one_tile

FEW = 48  # tokens
FEW_IN_16_BITS = 16  # of 16 bits that the CPU multiplies as they are: its own products of more were not measured
GROUP = 64  # columns that it takes at a time


def linear(x: Tensor, w: NF4Weight, c: Tensor | None) -> Tensor:
    """x·Wᵀ + c over a small matrix W."""
    if are_few(x):
        y = x.new_zeros(len(x), w.shape[0]) if c is None else c.expand(len(x), -1).clone()
        if added(y, x, w):
            return y
    return torch.nn.functional.linear(x, one_tile(w, x.dtype), c)


def are_few(x: Tensor) -> bool:
    """Whether there are so few tokens that decoding W for each eight of them costs less than tiles of W in memory."""
    M, dtype = len(x), x.dtype
    return M <= FEW_IN_16_BITS or (M <= FEW and product_dtype(dtype, x.device).itemsize >= 4)


def added(y: Tensor, x: Tensor, w: NF4Weight) -> bool:
    """y[M, N] += x·Wᵀ, W rounded to x's dtype, which is y's too; False, and nothing, where csrc/cpu cannot."""
    fits = are_few(x) and x.dtype == y.dtype != torch.float64 and x.stride(1) == y.stride(1) == 1
    if not fits or w.blocksize % GROUP or w.shape[1] % w.blocksize or not cpu_extension.takes(x, y):
        return False
    if (weight := for_extension(w)) is None:
        return False
    about = x.data_ptr(), x.stride(0), len(x), *w.shape, dtype_name(x.dtype), y.data_ptr(), y.stride(0)
    cpu_extension.extension.nf4_product(weight, *about, torch.get_num_threads())
    return True
