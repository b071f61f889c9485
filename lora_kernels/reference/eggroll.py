"""EGGROLL: evolution strategies by perturbations of a low rank (Sarkar et al. 2025, "Evolution Strategies at the Hyperscale").

Members 2j and 2j + 1 of a population of P are a pair, of W + (s/√r)·B_j·A_j and W - (s/√r)·B_j·A_j with A_j[r, K] and B_j[N, r]
drawn anew from (seed, j); x[P·M, K] holds M rows of each member.

    16  y_i = x_i·Wᵀ + (s_i/√r)·(x_i·A_jᵀ)·B_jᵀ + c with j = i // 2, s_i = s for even i and -s for odd
    17  dW = 1/(P·s·√r) Σ_j (f_2j - f_2j+1)·B_j·A_j, which estimates the gradient of the mean fitness f by W
"""

import torch
from torch import Tensor

from ..normal import normals


def factors(pairs: slice, N: int, K: int, r: int, seed: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A[pairs, r, K] and B[pairs, r, N], transposed: normal values of offsets 2·offset and that plus 1, a row for each rank."""
    rows = slice(pairs.start * r, pairs.stop * r)
    A, B = (
        normals(rows, width, seed, 2 * offset + i).view(pairs.stop - pairs.start, r, width) for i, width in enumerate((K, N))
    )
    return A, B


def forward(x: Tensor, W: Tensor, c: Tensor | None, P: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """y[P·M, N]."""
    A, B = (t.to(x.dtype) for t in factors(slice(0, P // 2), W.shape[0], W.shape[1], r, seed, offset))
    pairs, signs = x.view(P // 2, 2, -1, W.shape[1]), x.new_tensor([1.0, -1.0]).view(2, 1, 1)
    low_rank = (s / r**0.5) * signs * (pairs @ A.mT[:, None]) @ B[:, None]
    return torch.nn.functional.linear(x, W, c) + low_rank.reshape(-1, W.shape[0])  # 16


def gradient(f: Tensor, N: int, K: int, s: float, r: int, seed: Tensor, offset: int) -> Tensor:
    """dW[N, K] in f's dtype."""
    A, B = (t.to(f.dtype) for t in factors(slice(0, len(f) // 2), N, K, r, seed, offset))
    differences = (f[::2] - f[1::2]) / (len(f) * s * r**0.5)
    return torch.einsum("j,jrn,jrk->nk", differences, B, A)  # 17
