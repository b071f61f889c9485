"""A magnitude around any backend's layer (reference/magnitude.py): its own products compute v, a pass each way the rest.

v, of y's size, is kept, for dm reads it. By bytes in 16 bits the two passes move 10·M·N; rows of W scaled on their way into
scratch, twice, and dm from y would move 8·N·K + 2·M·N: less from M = K on. But of y, v is gone where m = 0 and cancels beside a
large c, and the caller may write to y.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..values import Dropout, Grads, LoRAWeights, Needs

Members = tuple[LoRAWeights, ...]
Functions = tuple[Callable[..., Any], Callable[..., Any]]
OWN = ("magnitude", "bias")  # the gradients that are computed here


class Steps(NamedTuple):
    """A backend's part: norm(W, A, B, s, dtype) -> n[N], W read as `dtype`, in wide_dtype(dtype, A.dtype);
    scale(v, m, n, c) -> y in v's dtype; scale_backward(dy, v, m, n, need_v, need_m, need_c) -> (dv in dy's dtype, dm, dc), None
    where it is not needed.
    """

    norm: Callable[..., Tensor]
    scale: Callable[..., Tensor]
    scale_backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def around(functions: Functions, steps: Steps) -> Functions:
    """Forward and backward of a backend that knows no magnitudes, for members that may have some.

    What is saved are every h, then every v, then every n, None of members without a magnitude.
    """
    compute, differentiate = functions

    def forward(x: Tensor, members: Members, dropout: Dropout | None) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        vs, hs = compute(x, tuple([without_magnitude(member) for member in members]), dropout)
        ys: list[Any] = list(vs)
        kept: list[Any] = [None] * len(vs)
        ns = list(kept)
        for i, (v, (W, A, B, c, s, m)) in enumerate(zip(vs, members, strict=True)):
            if m is not None:
                kept[i], ns[i] = v, steps.norm(W, A, B, s, x.dtype)
                ys[i] = steps.scale(v, m, ns[i], c)
        return tuple(ys), (*hs, *kept, *ns)

    def backward(
        dys: tuple[Tensor | None, ...],
        x: Tensor | None,
        members: Members,
        saved: tuple[Tensor | None, ...],
        dropout: Dropout | None,
        needs: Needs,
    ) -> Grads:
        count, dvs = len(members), list(dys)
        grads: list[dict[str, Tensor]] = []
        left: list[tuple[str, ...]] = []
        hs, vs, ns = saved[:count], saved[count : 2 * count], saved[2 * count :]
        for i, (dy, member, names) in enumerate(zip(dys, members, needs.members, strict=True)):
            own = () if dy is None or member.magnitude is None else tuple([name for name in OWN if name in names])
            left.append(tuple([name for name in names if name not in own]))
            grads.append({})
            if dy is None or member.magnitude is None:
                continue
            need_v = needs.x or bool(left[i])
            dvs[i], dm, dc = steps.scale_backward(dy, vs[i], member.magnitude, ns[i], need_v, "magnitude" in own, "bias" in own)
            grads[i] = {name: grad for name, grad in (("magnitude", dm), ("bias", dc)) if grad is not None}
        if all(dv is None for dv in dvs):
            return Grads(None, tuple(grads))
        inner = tuple([without_magnitude(member) for member in members])
        found = differentiate(tuple(dvs), x, inner, hs, dropout, Needs(needs.x, tuple(left)))
        return Grads(found.x, tuple([grad | own for grad, own in zip(found.members, grads, strict=True)]))

    return forward, backward


def without_magnitude(member: LoRAWeights) -> LoRAWeights:
    """v = x·Wᵀ + s·h·Bᵀ of a member with a magnitude; others as they are."""
    return member if member.magnitude is None else member._replace(bias=None, magnitude=None)
