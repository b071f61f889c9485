"""Equations 14 and 15 (reference/grouped_linear.py): h in a pass over x, y0 in one over y, to which the base product is added;
g and dB in a pass over dy each, dA in one over x, dx0 in one over dx. Only the gradient of segments' own W waits for the host.

Adapters of a list are packed into stacks of the largest rank. The base product is the vendor's over a weight that is shared,
and a kernel's over weights of segments' own, dense or in 4 bits: torch._grouped_mm does not accumulate, and y would be read and
written again.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...mask import LANE_RANGE, keep_scale, threshold
from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, Rows
from ..products import add_product, weight_gradient
from ..torch import grouped_linear as pytorch
from . import gpu, tuning
from .kernels.mask import edge
from .kernels.nf4_dequantize import dense
from .kernels.segment_nf4_product import add_nf4_products
from .kernels.segments import DROP_ALL, KEEP_ALL, add_products, expand, reduce, shrink
from .kernels.tiles import adjacent, row_major
from .planning import plan_of, refusal

FIELDS = pytorch.FIELDS
notes = gpu.notes
Members = tuple[LoRAWeights, ...]


def plan(call: Call) -> Plan | str:
    """The kernels for this call, or the reason why there are none."""
    if (reason := refusal(call)) is not None:
        return reason
    weight, ranks = call.members[0].weight, [m.lora_B.shape[-1] for m in call.members if m.lora_B is not None]
    if weight is not None and weight.quant_type is not None and len(weight.shape) == 3 and weight.shape[2] % 2:
        return f"two rows of {weight.shape[2]} codes share a byte"
    if max(ranks, default=0) > tuning.MAX_RANK:
        return f"adapters of rank above {tuning.MAX_RANK} are ordinary products, PyTorch's"
    return plan_of("triton", call, (forward, backward), (pytorch.forward, pytorch.backward))


class Factors(NamedTuple):
    """What each segment multiplies by: s, and with dropout 1 / (1 - p̂), the edge of its mask's lanes, and the seed."""

    s: Tensor
    keep: Tensor
    edge: Tensor | None
    seed: Tensor | None

    @property
    def mask(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.keep, self.edge, self.seed


def forward(
    x: Tensor, members: Members, dropout: Dropout | None, rows: Rows, ps: tuple[float, ...]
) -> tuple[tuple[Tensor], tuple[Tensor]]:
    """((y[M, N] in x's dtype,), (h[M, the largest R] in the adapters',))."""
    x, W, c = row_major(x), members[0].weight, members[0].bias
    A, B = stack(members, "lora_A"), stack(members, "lora_B")
    if 0 in (*x.shape, *A.shape, *B.shape):
        return pytorch.forward(x, members, dropout, rows, ps)
    factors = factors_of(members, dropout, ps, len(A), x.device)
    h = shrink(x, A, False, *factors.mask, rows)  # 1
    y = expand(h, B, True, adjacent(c), x.dtype, factors.s, None, None, rows)
    return (add_base(y, x, W, rows, True),), (h,)  # 2


def backward(
    dys: tuple[Tensor],
    x: Tensor | None,
    members: Members,
    saved: tuple[Tensor | None],
    dropout: Dropout | None,
    needs: Needs,
    rows: Rows,
    ps: tuple[float, ...],
) -> Grads:
    """Equation 15, as backends/torch/grouped_linear.py."""
    (dy,), (h,), W = dys, saved, members[0].weight
    sizes = [n for t in (dy, x, h, W, *(m.lora_B for m in members)) if t is not None for n in t.shape]
    if 0 in sizes:
        return pytorch.backward(dys, x, members, saved, dropout, needs, rows, ps)
    dy, x, dx, dA, dB = row_major(dy), None if x is None else row_major(x), None, None, None
    need_A, need_B, names = needs.any("lora_A"), needs.any("lora_B"), needs.members[0]
    own_bias = "bias" in names and members[0].bias.ndim == 2
    factors = factors_of(members, dropout, ps, rows.offsets.shape[0] - 1, dy.device)
    if needs.x or need_A:
        g = shrink(dy, stack(members, "lora_B"), True, factors.s, None, None, rows)  # 3
    if needs.x:
        dx = expand(g, stack(members, "lora_A"), False, None, dy.dtype, *factors.mask, rows)
        dx = add_base(dx, dy, W, rows, False)  # 4
    if need_A:
        dA, _ = reduce(g, x, False, *factors.mask, rows, False)  # 5
    if need_B or own_bias:
        dB, dc = reduce(adjacent(h) if need_B else None, dy, True, factors.s, None, None, rows, own_bias)  # 6
    grads = of_adapters(dA, dB, members, needs, rows)
    if "bias" in names:
        grads[0]["bias"] = dc if own_bias else dy.sum(0, dtype=torch.float32)
    if "weight" in names:
        grads[0]["weight"] = weight_gradient(dy, x) if W is not None and len(W.shape) == 2 else of_weights(dy, x, members, rows)
    return Grads(dx, tuple(grads))


def add_base(out: Tensor, u: Tensor, W: Tensor | NF4Weight, rows: Rows, forward: bool) -> Tensor:
    """out += u·Wᵀ in place, or u·W, over a shared W or each segment's own."""
    if len(W.shape) == 2:
        W = dense(W, u.dtype)
        return add_product(out, u, W.T if forward else W)
    if isinstance(W, NF4Weight):
        return add_nf4_products(out, u, W, rows, forward)
    return add_products(out, u, W if forward else W.mT, rows)


def stack(members: Members, name: str) -> Tensor:
    """The adapters' A or B as one stack: that which they are, or their copies in one of the largest rank."""
    if len(members) == 1:
        return adjacent(getattr(members[0], name))
    tensors = [getattr(member, name) for member in members[1:]]
    some = [t for t in tensors if t is not None]  # of the others no wanted gradient is
    by_rank = 0 if name == "lora_A" else 1
    shape = list(some[0].shape)
    shape[by_rank] = max(t.shape[by_rank] for t in some)
    found = some[0].new_zeros(len(tensors), *shape)
    places = [
        (found[e, : len(t)] if by_rank == 0 else found[e, :, : t.shape[1]], t) for e, t in enumerate(tensors) if t is not None
    ]
    torch._foreach_copy_([place for place, _ in places], [t.detach() for _, t in places])
    return found


def factors_of(members: Members, dropout: Dropout | None, ps: tuple[float, ...], E: int, device: torch.device) -> Factors:
    """Of each of E segments; made once for the same numbers."""
    scalings = [member.scaling for member in (members if len(members) == 1 else members[1:])]
    if any(isinstance(s, Tensor) for s in scalings):
        s = torch.stack([torch.as_tensor(s, dtype=torch.float32, device=device) for s in scalings]).expand(E).contiguous()
    else:
        s = constant(tuple([float(s) for s in scalings]) if len(scalings) == E else (float(scalings[0]),) * E, device)
    p = (0.0,) * E if dropout is None else ps or (dropout.p,) * E
    keep = constant(tuple([keep_scale(own) for own in p]), device)
    if dropout is None or not any(threshold(own) for own in p):
        return Factors(s, keep, None, None)
    return Factors(s, keep, constant(tuple([edge_of(own) for own in p]), device), dropout.seed)


@functools.lru_cache(256)
def constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """These numbers on the device, int32 or float32."""
    with torch.inference_mode(False):
        dtype = torch.int32 if isinstance(numbers[0], int) else torch.float32
        return torch.tensor(numbers, dtype=dtype, device=device)


def edge_of(p: float) -> int:
    """As the kernels read it."""
    bits = threshold(p)
    return KEEP_ALL if bits == 0 else DROP_ALL if bits == LANE_RANGE else edge(p)


def of_adapters(dA: Tensor | None, dB: Tensor | None, members: Members, needs: Needs, rows: Rows) -> list[dict[str, Tensor]]:
    """The gradients of A and B that are wanted, by member; of a list those of segments with rows, as far as the host knows."""
    stacks = [(name, grad) for name, grad in (("lora_A", dA), ("lora_B", dB)) if grad is not None]
    if len(members) == 1:
        return [{name: grad for name, grad in stacks if name in needs.members[0]}]
    ends = None if rows.host is None else rows.host.tolist()
    grads: list[dict[str, Tensor]] = [{}]
    for e, (member, names) in enumerate(zip(members[1:], needs.members[1:], strict=True)):
        there = ends is None or ends[e] < ends[e + 1]
        R = 0 if member.lora_B is None else member.lora_B.shape[1]
        own = {"lora_A": lambda t, R=R: t[:R], "lora_B": lambda t, R=R: t[:, :R].contiguous()}
        grads.append({name: own[name](grad[e]) for name, grad in stacks if there and name in names})
    return grads


def of_weights(dy: Tensor, x: Tensor | None, members: Members, rows: Rows) -> Tensor:
    """dW of segments' own weights, by PyTorch's backend, which reads the offsets: who trains experts whole waits for them."""
    weights = Needs(False, (("weight",), *[()] * (len(members) - 1)))
    return pytorch.backward((dy,), x, members, (None,), None, weights, rows, ()).members[0]["weight"]
