"""A gated MLP: three linear layers as in linear.py, members 0, 1 and 2, and an activation between them.

    I intermediate features, the out-features of gate and up      e u a  de du da [M,I]

    9  e = gate(x)    u = up(x)    a = act(e)·u    y = down(a)          10  du = da·act(e)    de = da·u·act'(e)

Without a gate, of members 1 and 2 alone: a = act(u) and du = da·act'(u).
"""

from typing import Any

from torch import Tensor

from ..values import Dropout, Grads, LoRAWeights, Needs, following
from . import linear
from .activation import act, act_derivative


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None, activation: str
) -> tuple[tuple[Tensor], tuple[Tensor | None, ...]]:
    """((y,), (e, u, h of every member)); without a gate there is no e."""
    outputs, hs = linear.forward(x, members[:-1], dropout)
    a = activated(outputs, activation)  # 9
    (y,), (h,) = linear.forward(a, members[-1:], following(dropout, len(members) - 1))
    return (y,), (*outputs, *hs, h)


def backward(
    dys: tuple[Tensor],
    x: Tensor,
    members: tuple[LoRAWeights, ...],
    saved: tuple[Any, ...],
    dropout: Dropout | None,
    needs: Needs,
    activation: str,
) -> Grads:
    """The wanted gradients."""
    count = len(members) - 1
    outputs, hs, a = saved[:count], saved[count:], activated(saved[:count], activation)
    own = Needs(True, needs.members[-1:])
    da, found = linear.backward(dys, a, members[-1:], hs[-1:], following(dropout, len(members) - 1), own)
    assert da is not None
    if count == 1:
        between: tuple[Tensor, ...] = (da * act_derivative(outputs[0], activation),)  # 10
    else:
        e, u = outputs
        between = (da * u * act_derivative(e, activation), da * act(e, activation))  # 10
    dx, inner = linear.backward(between, x, members[:-1], hs[:-1], dropout, Needs(needs.x, needs.members[:-1]))
    return Grads(dx, (*inner, *found))


def activated(outputs: tuple[Tensor, ...], activation: str) -> Tensor:
    """a = act(e)·u, or act(u)."""
    a = act(outputs[0], activation)
    return a * outputs[1] if len(outputs) == 2 else a
