"""Linear layers with low-rank adapters over one input; every member has equations of its own, and dx is their sum.

    M tokens, K in-features, N out-features, R rank
    x[M,K]  W[N,K]  A[R,K]  B[N,R]  c[N] bias  s scaling      y dy [M,N]   h g [M,R]   dx[M,K]   dW dA dB dc: like W A B c

    1  h  = drop(x)·Aᵀ                  4  dx = dy·W + undrop(g·A)
    2  y  = x·Wᵀ + s·h·Bᵀ + c           5  dA = gᵀ·drop(x)
    3  g  = s·dy·B                      6  dB = s·dyᵀ·h      dc = Σ dy      dW = dyᵀ·x, where W is trained too

A member with a magnitude goes through equations 11 to 13 (magnitude.py) too.

Adapters of another dtype than x's meet it in the wider of the two, as in PEFT; h is kept in theirs. A member without adapter,
A and B None, is y = x·Wᵀ + c.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..values import Dropout, Grads, LoRAWeights, Needs
from . import magnitude
from .mask import drop
from .nf4 import dense


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(y of every member, h of every member; and where there are magnitudes v and n of every member)."""
    ys: list[Any] = []
    hs, vs, ns = list(ys), list(ys), list(ys)
    for i, (W, A, B, c, s, m) in enumerate(members):
        y, h, v, n = linear(x, dense(W, x.dtype), c if m is None else None), None, None, None
        dtype = y.dtype
        if A is not None and B is not None:
            wide = torch.promote_types(x.dtype, A.dtype)
            h = linear(drop(x.to(wide), dropout, i), A.to(wide)).to(A.dtype)  # 1
            y = y + s * linear(h.to(wide), B.to(wide))  # 2
        if A is not None and B is not None and m is not None:
            v, n = y + (y.to(dtype) - y).detach(), magnitude.norm(dense(W, x.dtype), A, B, s)  # 11; v is rounded, dv is not
            y = magnitude.forward(v, m, n, c)  # 12
        for results, result in ((ys, y.to(dtype)), (hs, h), (vs, v), (ns, n)):
            results.append(result)
    return tuple(ys), (*hs, *vs, *ns) if any(n is not None for n in ns) else tuple(hs)


def backward(
    dys: tuple[Tensor, ...],
    x: Tensor,
    members: tuple[LoRAWeights, ...],
    saved: tuple[Any, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6, and 13."""
    dx, grads, count = torch.zeros_like(x), [], len(members)
    for i, (dy, (W, A, B, _, s, m), h) in enumerate(zip(dys, members, saved[:count], strict=True)):
        own = {"bias": dy.sum(0)}
        if m is not None:
            dy, own["magnitude"] = magnitude.backward(dy, saved[count + i], m, saved[2 * count + i])  # 13
        dx = dx + dy @ dense(W, x.dtype)
        grads.append({"weight": dy.T @ x} | own)
        if A is None or B is None:
            continue
        g = s * dy @ B  # 3
        dx = dx + drop(g @ A, dropout, i)  # 4
        grads[i] |= {"lora_A": g.T @ drop(x, dropout, i), "lora_B": s * dy.T @ h}  # 5 and 6
    wanted = [{field: grad[field] for field in fields} for grad, fields in zip(grads, needs.members, strict=True)]
    return Grads(dx if needs.x else None, tuple(wanted))
