"""DoRA's magnitude m[N] of a projection (Liu et al. 2024), v[M,N] being x·Wᵀ + s·h·Bᵀ; n[N] is constant in the gradient (§4.3).

    11  n = ‖W + s·B·A‖ by rows          13  dv = u ⊙ dy, for dy in equations 3 to 6 of linear.py
    12  y = u ⊙ v + c                        dm = (1 / n) Σ dy ⊙ v      dc = Σ dy

u = m / n, and 1 / n, are 0 where n is.
"""

import torch
from torch import Tensor


@torch.no_grad()
def norm(W: Tensor, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
    """Equation 11, in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
    return torch.linalg.vector_norm(W.to(wide) + s * B.to(wide) @ A.to(wide), dim=1)


def forward(v: Tensor, m: Tensor, n: Tensor, c: Tensor | None) -> Tensor:
    """Equation 12."""
    return v * over(m, n) + (0 if c is None else c)


def backward(dy: Tensor, v: Tensor, m: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """(dv, dm) of equation 13."""
    return dy * over(m, n), over((dy * v).sum(0), n)


def over(a: Tensor, n: Tensor) -> Tensor:
    """a / n, 0 where n is."""
    return a / n.masked_fill(n == 0, torch.inf)  # whose gradient is 0 there too, where that of a / 0 is NaN
