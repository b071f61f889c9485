"""Linear layers with low-rank adapters over one input; every member has equations of its own, and dx is their sum.

    M tokens, K in-features, N out-features, R rank
    x[M,K]  W[N,K]  A[R,K]  B[N,R]  c[N] bias  s scaling      y dy [M,N]   h g [M,R]   dx[M,K]   dW dA dB dc: like W A B c

    1  h  = drop(x)·Aᵀ                  4  dx = dy·W + undrop(g·A)
    2  y  = x·Wᵀ + s·h·Bᵀ + c           5  dA = gᵀ·drop(x)
    3  g  = s·dy·B                      6  dB = s·dyᵀ·h      dc = Σ dy      dW = dyᵀ·x, where W is trained too

Adapters of another dtype than x's meet it in the wider of the two, as in PEFT; h is kept in theirs. A member without adapter,
A and B None, is y = x·Wᵀ + c.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..values import Dropout, Grads, LoRAWeights, Needs
from .mask import drop
from .nf4 import dense


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(y of every member, h of every member)."""
    ys, hs = [], []
    for i, (W, A, B, c, s) in enumerate(members):
        y, h = linear(x, dense(W, x.dtype), c), None
        if A is not None and B is not None:
            wide = torch.promote_types(x.dtype, A.dtype)
            h = linear(drop(x.to(wide), dropout, i), A.to(wide)).to(A.dtype)  # 1
            y = (y + s * linear(h.to(wide), B.to(wide))).to(y.dtype)  # 2
        ys.append(y)
        hs.append(h)
    return tuple(ys), tuple(hs)


def backward(
    dys: tuple[Tensor, ...],
    x: Tensor,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Any, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6."""
    dx, grads = torch.zeros_like(x), []
    for i, (dy, (W, A, B, _, s), h) in enumerate(zip(dys, members, hs, strict=True)):
        dx = dx + dy @ dense(W, x.dtype)
        grads.append({"weight": dy.T @ x, "bias": dy.sum(0)})
        if A is None or B is None:
            continue
        g = s * dy @ B  # 3
        dx = dx + drop(g @ A, dropout, i)  # 4
        grads[i] |= {"lora_A": g.T @ drop(x, dropout, i), "lora_B": s * dy.T @ h}  # 5 and 6
    wanted = [{field: grad[field] for field in fields} for grad, fields in zip(grads, needs.members, strict=True)]
    return Grads(dx if needs.x else None, tuple(wanted))
