"""Equations 1 to 6 (reference/linear.py): h in one pass over x; y0 = s·h·Bᵀ + c, to which the vendor's product adds x·Wᵀ in
place; g, dB and dc in one pass over dy; dA and dx0 = undrop(g·A) in one pass over x, to which dy·W is added in place.
A pass over x serves three members, each with its own mask.

Where a measurement says that it wins, the product and its low-rank term are one kernel. Adapters of a rank above MAX_RANK are
ordinary products, as PyTorch's backend takes them, over this backend's masks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...plan import Call, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs, following
from .. import nf4_paths
from ..products import add_product, weight_gradient
from ..torch import linear as pytorch
from ..torch.engine import ChunkMask
from . import gpu, tuning
from .kernels import lowrank_product, nf4_product
from .kernels.grad_dy import grad_dy
from .kernels.grad_x import grad_x
from .kernels.mask import drop, drops
from .kernels.members import MEMBERS
from .kernels.nf4_dequantize import dense
from .kernels.prefill import prefill
from .kernels.project import project
from .kernels.tiles import adjacent, readable, row_major
from .planning import plan_of, refusal

FIELDS = frozenset({"weight", "lora_A", "lora_B", "bias", "scaling", "magnitude"})
notes = gpu.notes


def plan(call: Call) -> Plan | str:
    """The kernels for this call, or the reason why there are none."""
    return refusal(call) or plan_of("triton", call, (forward, backward), (pytorch.forward, pytorch.backward))


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: every member's y[M,N] in x's dtype, and its h[M,R] in A's, None without adapters."""
    x, dropout, ys = row_major(x), dropping(dropout), []
    hs = projections(x, members, dropout)
    for i, member in enumerate(members):
        if (h := hs[i]) is None:
            y, hs[i] = by_pytorch(x, member, dropout, i)
        else:
            y = output(x, member, h)
        ys.append(y)
    return tuple(ys), tuple(hs)


def projections(x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None) -> list[Tensor | None]:
    """Equation 1: h of every member whose adapters the kernels multiply, three in one pass over x; None of the others."""
    hs: list[Tensor | None] = [None] * len(members)
    numbers = [i for i, member in enumerate(members) if in_kernels(x, member)]
    for first in range(0, len(numbers), MEMBERS):
        three = tuple(numbers[first : first + MEMBERS])
        found = project(x, tuple([adjacent(members[i].lora_A) for i in three]), dropout, three)
        for i, h in zip(three, found, strict=True):
            hs[i] = h
    return hs


def in_kernels(x: Tensor, member: LoRAWeights) -> bool:
    """Whether the kernels multiply this member's adapters: it has some, of a rank that they take, and nothing is empty."""
    B = member.lora_B
    return B is not None and B.shape[1] <= tuning.MAX_RANK and 0 not in (*x.shape, *B.shape)


def by_pytorch(x: Tensor, member: LoRAWeights, dropout: Dropout | None, number: int) -> tuple[Tensor, Tensor | None]:
    """(y, h) of any other member: equations 1 and 2 as ordinary products."""
    W = dense(member.weight, x.dtype)
    if member.lora_B is None:
        return torch.nn.functional.linear(x, W, member.bias), None
    (y,), (h,) = pytorch.forward(x, (member._replace(weight=W),), following(dropout, number), WideMask)
    return y, h


def output(x: Tensor, member: LoRAWeights, h: Tensor) -> Tensor:
    """Equation 2: y[M,N] in x's dtype."""
    W, A, B, c, s, _ = member
    s, B, c = readable(s, x.device), adjacent(B), adjacent(c)
    if isinstance(W, NF4Weight):
        if nf4_path(x, W, A)[0] != "scratch":
            return nf4_product.product(x, W, h, B, s, c)
        W = dense(W, x.dtype)
    if tuning.dataflow(x, W, "forward") == "lowrank_product":
        return lowrank_product.forward(x, W, h, B, s, c)
    return add_product(prefill(h, B, s, c, x.dtype), x, W.T)


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6 for what is wanted, as backends/torch/linear.py; dc is in float32."""
    x, dropout = None if x is None else row_major(x), dropping(dropout)
    shares: dict[int, Share] = {}
    grads: dict[int, dict[str, Tensor]] = {}
    apart: Tensor | None = None  # dx of the members that the kernels do not take
    for i, (dy, member, h, wanted) in enumerate(zip(dys, members, hs, needs.members, strict=True)):
        if dy is None:
            continue
        dy = row_major(dy)
        if backward_in_kernels(dy, x, member, h):
            shares[i] = Share(dy, member, *reductions(dy, member, h, wanted, needs.x), wanted)
            grads[i] = shares[i].grads
            continue
        member, own = member._replace(weight=dense(member.weight, dy.dtype)), following(dropout, i)
        dx, (grads[i],) = pytorch.backward((dy,), x, (member,), (h,), own, Needs(needs.x, (wanted,)), WideMask)
        apart = dx if apart is None else apart.add_(dx)
    dx = input_gradients(x, shares, dropout, needs.x)
    if apart is not None:
        dx = apart if dx is None else dx.add_(apart)
    return Grads(dx, tuple([grads.get(i, {}) for i in range(len(members))]))


def backward_in_kernels(dy: Tensor, x: Tensor | None, member: LoRAWeights, h: Tensor | None) -> bool:
    """As in_kernels; what no wanted gradient reads may be None."""
    W, _, B, _, _, _ = member
    low = B if B is not None else h
    if 0 in (*dy.shape, *(() if W is None else W.shape), *(() if x is None else x.shape), *(() if low is None else low.shape)):
        return False
    return low is None or low.shape[1] <= tuning.MAX_RANK


def reductions(
    dy: Tensor, member: LoRAWeights, h: Tensor | None, wanted: tuple[str, ...], need_x: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Equations 3 and 6 of one member: (g where dx or dA needs it, those of dB and dc that are wanted)."""
    B, need_B, need_c = member.lora_B, "lora_B" in wanted, "bias" in wanted
    need_g = B is not None and (need_x or "lora_A" in wanted)
    g, dB, dc = grad_dy(dy, adjacent(h), adjacent(B), readable(member.scaling, dy.device), need_g, need_B, need_c)
    return g, sums_of(dB, dc)


def sums_of(dB: Tensor | None, dc: Tensor | None) -> dict[str, Tensor]:
    """Those that are there, by field."""
    return {field: grad for field, grad in (("lora_B", dB), ("bias", dc)) if grad is not None}


class Share(NamedTuple):
    """What a member adds to dx, dy·W + undrop(g·A), g None without adapters; and its gradients, those that read x to come."""

    dy: Tensor
    member: LoRAWeights
    g: Tensor | None
    grads: dict[str, Tensor]
    wanted: tuple[str, ...]


def input_gradients(x: Tensor | None, shares: dict[int, Share], dropout: Dropout | None, need_x: bool) -> Tensor | None:
    """Equations 4 and 5 of members by number: dx is returned, each dA, and dW, goes to its member's gradients.

    Three members share a pass over x; every dy·W is then added in place, and of 4-bit weights one is dense at a time.
    """
    for share in shares.values():
        if "weight" in share.wanted:
            share.grads["weight"] = weight_gradient(share.dy, x)
    low_rank = tuple([i for i, share in shares.items() if share.g is not None])
    bases: list[tuple[Tensor, Any]] = [(share.dy, share.member.weight) for share in shares.values()] if need_x else []
    in_one_kernel = False
    if len(bases) == len(low_rank) == 1:
        ((dy, W),) = bases
        bases = [(dy, dense(W, dy.dtype))]
        in_one_kernel = tuning.dataflow(*bases[0], "backward") != "prefill"
    dx: Tensor | None = None
    for first in range(0, len(low_rank), MEMBERS):
        three = low_rank[first : first + MEMBERS]
        dtype, gs = shares[three[0]].dy.dtype, tuple([shares[i].g for i in three])
        As, need_As = (
            tuple([adjacent(shares[i].member.lora_A) for i in three]),
            tuple(["lora_A" in shares[i].wanted for i in three]),
        )
        part, dAs = grad_x(x, gs, As, dropout, dtype, need_x and not in_one_kernel, need_As, three)
        dx = part if dx is None or part is None else dx.add_(part)
        for i, dA in zip(three, dAs, strict=True):
            if dA is not None:
                shares[i].grads["lora_A"] = dA
    if in_one_kernel:
        return lowrank_product.backward(*bases[0], gs[0], As[0], following(dropout, three[0]))
    for dy, W in bases:
        dx = dy @ dense(W, dy.dtype) if dx is None else add_product(dx, dy, dense(W, dy.dtype))
    return dx


class WideMask(ChunkMask):
    """keep by the Triton kernel, for adapters that PyTorch's backend multiplies."""

    def __init__(self, K: int, dropout: Dropout, member: int, dtype: torch.dtype):
        self.p, self.seed, self.offset = dropout.p, dropout.seed, dropout.offset + member

    def chunk(self, rows: slice) -> None:
        self.first_row = rows.start

    def undrop_(self, v: Tensor) -> None:
        self._drop(v, v)

    def dropped(self, v: Tensor) -> Tensor:
        return self._drop(v, torch.empty_like(v))

    def _drop(self, v: Tensor, out: Tensor) -> Tensor:
        return drop(v, self.p, self.seed, self.offset, first_row=self.first_row, out=out)


def nf4_path(
    x: Tensor, W: NF4Weight, A: Tensor, skinny_refusal: Callable[[], str | None] = lambda: "it is in the CUDA extension"
) -> tuple[str, str]:
    """(path, why) of the product with a 4-bit weight, by the table of nf4_paths."""
    refusals: dict[str, Callable[[], str | None]] = {
        "skinny": skinny_refusal,
        "loop": lambda: nf4_product.refusal(x, W, A.shape[0]),
        "scratch": lambda: None,
    }
    return nf4_paths.path(len(x), tuning.gpu(x.device).capability, lambda path: refusals[path]())


def dropping(dropout: Dropout | None) -> Dropout | None:
    """None where p is below 2^-17, and rounds to a mask of ones."""
    return dropout if dropout is not None and drops(dropout.p) else None
