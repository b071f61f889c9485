"""Equations 9 and 10 (reference/glu_mlp.py) over kernels. Forward, one pass reads e and u, writes a and makes down's h.
Backward, one pass reads da, e and u, writes de and du, and makes what else reads them or a: down's undrop(g·A) and dA, and g,
dB and dc of gate and up. x is read as by linear.py, once for gate and up together.

Where an adapter's rank is above MAX_RANK, its part is what linear.py makes of it, beside the same kernels.
"""

import torch
from torch import Tensor

from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, following
from ..products import weight_gradient
from ..torch import glu_mlp as pytorch
from ..torch import linear as pytorch_linear
from . import linear
from .kernels.glu import glu
from .kernels.glu_backward import NOTHING, Down, Entry, glu_backward
from .kernels.nf4_dequantize import dense
from .kernels.tiles import adjacent, readable, row_major
from .planning import plan_of, refusal

FIELDS, notes = linear.FIELDS - {"magnitude"}, linear.notes


def plan(call: Call) -> Plan | str:
    """The kernels for this call, or the reason why there are none."""
    return refusal(call) or plan_of("triton", call, (forward, backward), pytorch.plan(call)[2:])


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None, activation: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """((y,), (e, u, h of every member)); without a gate there is no e."""
    outputs, hs = linear.forward(x, members[:-1], dropout)
    dropout, down = linear.dropping(following(dropout, len(members) - 1)), members[-1]
    a, h = activated(outputs, down, dropout, activation)
    if h is None:
        y, h = linear.by_pytorch(a, down, dropout, 0)
    else:
        y = linear.output(a, down, h)
    return (y,), (*outputs, *hs, h)


def activated(
    outputs: tuple[Tensor, ...], down: LoRAWeights, dropout: Dropout | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """(a, down's h, None where the kernels do not multiply its adapters)."""
    *gate, u = [adjacent(output) for output in outputs]
    if not u.numel():
        return torch.empty_like(u), None
    A = adjacent(down.lora_A) if linear.in_kernels(u, down) else None
    return glu(gate[0] if gate else None, u, A, dropout, activation)


def backward(
    dys: tuple[Tensor, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    saved: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
    activation: str,
) -> Grads:
    """Equations 10, and 3 to 6 of every member. What no wanted gradient reads may be None: see functional/glu_mlp.py."""
    count, dropout = len(members) - 1, linear.dropping(dropout)
    outputs, hs, of_inner = tuple([adjacent(t) for t in saved[:count]]), saved[count:], needs.members[:count]
    u = outputs[-1]
    if 0 in (dys[0].numel(), 1 if u is None else u.numel()):
        return pytorch.backward(pytorch_linear, dys, x, members, saved, dropout, needs, activation)
    through = needs.x or any(of_inner)
    own = following(dropout, count)
    da, down, of_down = behind_down(row_major(dys[0]), outputs, members[-1], hs[-1], own, needs, activation)
    if not (through or down.need_A):
        return Grads(None, (*({} for _ in of_inner), of_down))
    pairs = list(zip(members[:count], hs[:count], strict=True))
    fused = through and all(linear.backward_in_kernels(u, x, *pair) for pair in pairs)
    entries = [entry_of(*pair, names, needs.x, fused, dys[0].device) for pair, names in zip(pairs, of_inner, strict=True)]
    gate, up = entries if count == 2 else (NOTHING, *entries)
    found = glu_backward(da, outputs[0] if count == 2 else None, u, down, gate, up, activation)
    if down.need_A:
        of_down["lora_A"] = found.dA
    between = (found.de, found.du)[-count:]
    if through and not fused:
        dx, grads = linear.backward(between, x, members[:count], hs[:count], dropout, Needs(needs.x, of_inner))
        return Grads(dx, (*grads, of_down))
    shares = {}
    for i, (d, (g, dB, dc)) in enumerate(zip(between, (found.gate, found.up)[-count:], strict=True)):
        if d is not None:
            shares[i] = linear.Share(d, members[i], g, linear.sums_of(dB, dc), of_inner[i])
    dx = linear.input_gradients(x, shares, dropout, needs.x)
    return Grads(dx, (*(shares[i].grads if i in shares else {} for i in range(count)), of_down))


def behind_down(
    dy: Tensor,
    outputs: tuple[Tensor | None, ...],
    down: LoRAWeights,
    h: Tensor | None,
    dropout: Dropout | None,
    needs: Needs,
    activation: str,
) -> tuple[Tensor | None, Down, dict[str, Tensor]]:
    """(da, what it lacks, down's gradients without what the kernel between makes of a)."""
    through, wanted, no_adapters = needs.x or any(needs.members[:-1]), needs.members[-1], Down(None, None, None, False)
    in_kernels = linear.backward_in_kernels(dy, None, down, h)
    a = None
    if "weight" in wanted or ("lora_A" in wanted and not in_kernels):
        a, _ = activated(outputs, down._replace(lora_A=None, lora_B=None), None, activation)
    if not in_kernels:
        da, (found,) = linear.backward((dy,), a, (down,), (h,), dropout, Needs(through, (wanted,)))
        return da, no_adapters, found
    g, found = linear.reductions(dy, down, h, wanted, through)
    if "weight" in wanted:
        found["weight"] = weight_gradient(dy, a)
    da = dy @ dense(down.weight, dy.dtype) if through else None
    if g is None:
        return da, no_adapters, found
    return da, Down(g, adjacent(down.lora_A) if through else None, dropout, "lora_A" in wanted), found


def entry_of(
    member: LoRAWeights, h: Tensor | None, wanted: tuple[str, ...], need_x: bool, fused: bool, device: torch.device
) -> Entry:
    """What the kernel makes of gate or up: where its adapters are not `fused` into it, only the gradient of its output."""
    needed, B = need_x or bool(wanted), member.lora_B
    if not (needed and fused):
        return NOTHING._replace(needed=needed)
    need_g, need_B = B is not None and (need_x or "lora_A" in wanted), "lora_B" in wanted
    return Entry(True, adjacent(h), adjacent(B), readable(member.scaling, device), need_g, need_B, "bias" in wanted)
