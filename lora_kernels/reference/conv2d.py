"""A 2-D convolution with a low-rank adapter: a convolution down to R channels, and 1x1 up.

    n samples, C in-channels, N out-channels, R rank, ∗ the convolution with the base's stride, padding and dilation
    x[n,C,·,·]  W[N,C,k,k]  A[R,C,k,k]  B[N,R,1,1]  c[N] bias  s scaling      y dy [n,N,·,·]   h g [n,R,·,·]   dx like x

    18  h = drop(x) ∗ A, or drop(x ∗ A)      20  g = s·dy ∗ Bᵀ, in the latter undrop(g)
    19  y = x ∗ W + s·h ∗ B + c              21  dx = dy ∗' W + undrop(g ∗' A), in the latter g ∗' A; ∗' is the transpose of ∗
                                             22  dA, dB, dW: the gradients of 18 and 19 by their weights;  dc = Σ dy

The mask is that of x's pixels as rows, or of h's, in the order (sample, line, column), and channels as columns.
"""

import typing

import torch
import torch.nn.functional as F
from torch import Tensor

from ..values import Dropout, LoRAWeights, Window
from . import mask


def forward(x: Tensor, member: LoRAWeights, dropout: Dropout | None, position: str, window: Window) -> tuple[Tensor, Tensor]:
    """(y, h), for autograd to differentiate; adapters of another dtype meet x in the wider of the two, as in PEFT."""
    W, c, s = member.weight, member.bias, member.scaling
    A, B = typing.cast(Tensor, member.lora_A), typing.cast(Tensor, member.lora_B)
    wide = torch.promote_types(x.dtype, A.dtype)
    y = convolve(x, W, c, window)  # type: ignore[arg-type]
    h = convolve(drop(x.to(wide), dropout) if position == "x" else x.to(wide), A.to(wide), None, window).to(A.dtype)  # 18
    h = drop(h, dropout) if position == "h" else h
    return (y + s * F.conv2d(h.to(wide), B.to(wide))).to(y.dtype), h  # 19


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """x ∗ weight + bias."""
    lines, columns = window.beyond
    return F.conv2d(F.pad(x, (0, columns, 0, lines)), weight, bias, window.stride, window.padding, window.dilation)


def drop(v: Tensor, dropout: Dropout | None) -> Tensor:
    """drop(v[n, ·, H, W]), whose pixels are the mask's rows."""
    pixels = v.permute(0, 2, 3, 1)
    return mask.drop(pixels.reshape(-1, v.shape[1]), dropout, 0).view(pixels.shape).permute(0, 3, 1, 2)
