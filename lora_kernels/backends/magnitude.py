"""A magnitude around any backend's layer (reference/magnitude.py): its own products compute v, a pass each way the rest.

v, of y's size, is kept, for dm reads it. By bytes in 16 bits the two passes move 10·M·N; rows of W scaled on their way into
scratch, twice, and dm from y would move 8·N·K + 2·M·N: less from M = K on. But of y, v is gone where m = 0 and cancels beside a
large c, and the caller may write to y.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.magnitude import over
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
        hs, vs, ns = saved[:count], saved[count : 2 * count], saved[2 * count :]
        here, apart, left = [list(names) for names in zip(*map(shares, dys, members, hs, needs.members), strict=True)]
        grads: list[dict[str, Tensor]] = [{} for _ in members]
        for i, (dy, member) in enumerate(zip(dys, members, strict=True)):
            if dy is not None and member.magnitude is not None:
                needed = needs.x or bool(left[i]), "magnitude" in here[i], "bias" in here[i]
                dvs[i], dm, dc = steps.scale_backward(dy, vs[i], member.magnitude, ns[i], *needed)
                grads[i] = {name: grad for name, grad in (("magnitude", dm), ("bias", dc)) if grad is not None}
        if any(apart):
            gains = [None if n is None else over(member.magnitude, n) for member, n in zip(members, ns, strict=True)]
            parts = of_wide_adapters(differentiate, dys, x, members, hs, dropout, tuple(apart), gains)
            grads = [grad | part for grad, part in zip(grads, parts, strict=True)]
        dvs = [dv if needs.x or names else None for dv, names in zip(dvs, left, strict=True)]
        if all(dv is None for dv in dvs):
            return Grads(None, tuple(grads))
        inner = tuple([without_magnitude(member) for member in members])
        found = differentiate(tuple(dvs), x, inner, hs, dropout, Needs(needs.x, tuple(left)))
        return Grads(found.x, tuple([grad | part for grad, part in zip(grads, found.members, strict=True)]))

    return forward, backward


Names = tuple[str, ...]


def shares(dy: Tensor | None, member: LoRAWeights, h: Tensor | None, names: Names) -> tuple[Names, Names, Names]:
    """Of a member's wanted gradients those that are computed here, those of adapters wider than dy, and all others."""
    if dy is None or member.magnitude is None:
        return (), (), names
    adapter = member.lora_B if h is None else h
    is_wide = adapter is not None and torch.promote_types(adapter.dtype, dy.dtype) != dy.dtype
    wide = ("lora_A", "lora_B") if is_wide else ()
    here, apart = ([name for name in names if name in own] for own in (OWN, wide))
    return tuple(here), tuple(apart), tuple([name for name in names if name not in (*here, *apart)])


def of_wide_adapters(
    differentiate: Callable[..., Grads],
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: Members,
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    wanted: tuple[Names, ...],
    gains: list[Tensor | None],
) -> list[dict[str, Tensor]]:
    """Equations 3, 5 and 6 from dy itself: g = s·dy·(u ⊙ B), dB = u ⊙ (s·dyᵀ·h).

    dv is rounded to dy's dtype: by it dA and dB of float32 adapters over bfloat16 would be off by 1.7e-3, PEFT's are by 3e-7.
    """
    scaled = []
    for member, u in zip(members, gains, strict=True):
        B = member.lora_B
        B = B if B is None or u is None else (u[:, None] * B).to(B.dtype)
        scaled.append(member._replace(lora_B=B, bias=None, magnitude=None))
    only = tuple([dy if names else None for dy, names in zip(dys, wanted, strict=True)])
    found = differentiate(only, x, tuple(scaled), hs, dropout, Needs(False, wanted)).members
    for grads, u in zip(found, gains, strict=True):
        if "lora_B" in grads:
            grads["lora_B"] *= u[:, None]
    return list(found)


def without_magnitude(member: LoRAWeights) -> LoRAWeights:
    """v = x·Wᵀ + s·h·Bᵀ of a member with a magnitude; others as they are."""
    return member if member.magnitude is None else member._replace(bias=None, magnitude=None)
