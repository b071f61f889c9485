"""The vendors' matrix products (cuBLAS, oneDNN, MKL), in place and rounded once, as every backend wants them."""

import torch
from torch import Tensor

from ..scratch import slices


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a·b in place, in out's dtype: the product's own, or float32 in tiles, whose copies stay small."""
    if out.dtype == a.dtype:
        return accumulate(out, a, b)
    for rows in slices(a.shape[0], 2048):
        wide = a[rows].to(out.dtype)
        for columns in slices(b.shape[1], 512):
            out[rows, columns].addmm_(wide, b[:, columns].to(out.dtype))
    return out


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out += a·b in place; all of one dtype."""
    return out.add_(a @ b) if _is_thin(out) else out.addmm_(a, b)


SMALL = 1 << 14  # elements of dy below which a copy of B, or of dB, costs more than it saves


def columns_together(B: Tensor, dy: Tensor) -> Tensor:
    """B with contiguous columns: dy·B is twice as fast then, once dy is large."""
    return B if dy.numel() < SMALL else B.T.contiguous().T


def transposed_product(dy: Tensor, h: Tensor) -> Tensor:
    """dyᵀ·h[N, R]; of a large dy as (hᵀ·dy)ᵀ, which is 2 to 17 times as fast for R = 8 (MKL, 128 to 512 rows)."""
    return dy.T @ h if dy.numel() < SMALL else (h.T @ dy).T


def _is_thin(out: Tensor) -> bool:
    """Whether a CPU would sum a·b into float32 or float64 `out` term by term, with twice the error of adding it once.

    MKL does so for up to three rows and up to nine columns: on an AVX2 CPU with K = 512 1.5 to 2.2 times the error.
    """
    return out.dtype.itemsize >= 4 and out.device.type == "cpu" and min(out.shape) < 16


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """dW = dyᵀ·x, for a base weight that is trained as well."""
    dtype = product_dtype(x.dtype, x.device)
    return add_product(dy.new_zeros(dy.shape[1], x.shape[1], dtype=dtype), dy.T, x).to(x.dtype)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which products of `dtype` are computed and summed up: itself where the device multiplies it, else float32.

    A CPU without instructions for a 16-bit dtype falls to a scalar loop in PyTorch (seconds to minutes per layer).
    """
    return torch.float32 if device.type == "cpu" and not cpu_multiplies(dtype) else dtype


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for `dtype` that PyTorch uses."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(torch.ops.mkldnn, name)())
