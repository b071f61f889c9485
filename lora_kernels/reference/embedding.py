"""An embedding with a low-rank adapter, in PEFT's layout.

M indices i, V rows, N features, R rank      W[V,N]  A[R,V]  B[N,R]  s scaling      y dy [M,N]   h g [M,R]

23  h = Aᵀ[i]                       25  g = s·dy·B, zero where i is padding_idx;  dA[:, v] = Σ g over i = v
24  y = W[i] + s·h·Bᵀ               26  dB = s·dyᵀ·h;  dW[v] = Σ dy over i = v, but none for padding_idx
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(ids: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float | Tensor, padding_idx: int | None) -> Tensor:
    """y[..., N] in W's dtype, for autograd to differentiate; the product in the wider of W's and the adapters'."""
    wide = torch.promote_types(W.dtype, A.dtype)
    h = F.embedding(ids, A.T, padding_idx)  # 23
    return (F.embedding(ids, W, padding_idx) + s * F.linear(h.to(wide), B.to(wide))).to(W.dtype)  # 24
