"""Equations 9 and 10 (reference/glu_mlp.py): a = act(e)·u, and its gradients."""

import torch
from torch import Tensor

from ...reference.activation import act, act_derivative


def gated(e: Tensor | None, u: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """a = act(e)·u, or act(u) where e is None, in float32 or wider and rounded once to u's dtype."""
    wide = torch.promote_types(u.dtype, torch.float32)
    a = act(u.to(wide), activation) if e is None else act(e.to(wide), activation) * u.to(wide)
    return a.to(u.dtype) if out is None else out.copy_(a)


def gated_backward(da: Tensor, e: Tensor | None, u: Tensor, activation: str, de: Tensor | None, du: Tensor) -> None:
    """de = da·u·act'(e) and du = da·act(e), or du = da·act'(u), written to memory that may be da's own."""
    wide = torch.promote_types(u.dtype, torch.float32)
    da, u = da.to(wide), u.to(wide)
    if e is None or de is None:
        du.copy_(da * act_derivative(u, activation))
        return
    e = e.to(wide)
    wide_du = da * act(e, activation)
    de.copy_(da * u * act_derivative(e, activation))
    du.copy_(wide_du)
