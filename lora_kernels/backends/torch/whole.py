"""Equations 1 to 6 (reference/linear.py) where all is of one wide dtype and one chunk of rows: an operation for each product.

Operations, and not bytes, are what such a call costs: at x[8, 32] each of them takes 4 to 8 µs of a CPU's thread.
"""

import functools

import torch.nn.functional as F
from torch import Tensor

from ...mask import chunk_elements, drop
from ...nf4 import NF4Weight
from ...plan import Call, Layout
from ...values import Dropout, Grads, LoRAWeights, Needs
from ..products import accumulate, columns_together, product, transposed_product
from . import nf4_product
from .engine import members_backward
from .nf4 import one_tile, tile_size


def fits(call: Call) -> bool:
    """Whether every call of this one's kind, of up to the next power of two rows, is whole: float32 or float64."""
    return call.dtype.itemsize >= 4 and call.rows > 0 and all(_fits(member, call) for member in call.members)


def _fits(member: LoRAWeights, call: Call) -> bool:
    layouts: tuple[Layout | None, ...] = member[:4]  # type: ignore[assignment]
    weight, A, B, c = layouts
    if weight is None or (A is None) != (B is None):
        return False  # of a backward pass in a compiled graph, which has no more than its gradients read
    if not (A is None or isinstance(member.scaling, (int, float))) and call.device.type != "cpu":
        return False  # a number would have to wait for the device
    rows, widest, size = rows_of_kind(call), max(weight.shape), weight.shape.numel()  # type: ignore[attr-defined]
    packed = weight.quant_type is not None
    if size == 0 or rows * widest > chunk_elements(call.device) or (packed and size > tile_size(call.device)):
        return False
    return all(t is None or t.dtype == call.dtype for t in ((A, B, c) if packed else layouts))


def rows_of_kind(call: Call) -> int:
    """The most rows of a call that has the same plan."""
    return 1 << (call.rows - 1).bit_length()


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: every member's y[M,N] and h[M,R]."""
    pairs = [_forward_of(x, member, dropout, i) for i, member in enumerate(members)]
    return tuple([y for y, _ in pairs]), tuple([h for _, h in pairs])


def _forward_of(x: Tensor, member: LoRAWeights, dropout: Dropout | None, number: int) -> tuple[Tensor, Tensor | None]:
    W, A, B, c, s, _ = member
    h = None if A is None else F.linear(x if dropout is None else _dropped(x, dropout, number), A)  # 1
    y = nf4_product.linear(x, W, c) if isinstance(W, NF4Weight) else F.linear(x, W, c)
    return y if h is None else y.addmm_(h, B.T, alpha=float(s)), h  # 2


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6, as linear.backward in this folder."""
    return members_backward(dys, x, members, hs, needs, functools.partial(_backward_of, dropout=dropout))


def _backward_of(
    dy: Tensor,
    x: Tensor | None,
    member: LoRAWeights,
    h: Tensor | None,
    dx: Tensor | None,
    need_x: bool,
    wanted: tuple[str, ...],
    number: int,
    dropout: Dropout | None,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(dx with one member's part, its wanted gradients but W's)."""
    (W, A, B, _, _, _), s = member, float(member.scaling)
    found = {}
    if (need_x and A is not None) or "lora_A" in wanted:
        g = product(dy, columns_together(B, dy), s)  # 3
    if need_x:
        W = one_tile(W, dy.dtype) if isinstance(W, NF4Weight) else W
        dx = dy @ W if dx is None else accumulate(dx, dy, W)
        if A is None:
            pass
        elif dropout is None:
            dx.addmm_(g, A)  # 4
        else:
            low_rank = g @ A
            dx.add_(_dropped(low_rank, dropout, number, out=low_rank))  # 4
    if "lora_A" in wanted:
        found["lora_A"] = g.T @ (x if dropout is None else _dropped(x, dropout, number))  # 5
    if "lora_B" in wanted:
        found["lora_B"] = transposed_product(dy, h, s).contiguous()  # 6
    if "bias" in wanted:
        found["bias"] = dy.sum(0)  # 6
    return dx, found


def _dropped(v: Tensor, dropout: Dropout, number: int, out: Tensor | None = None) -> Tensor:
    """drop(v), or undrop(v), which is the same."""
    return drop(v, dropout.p, dropout.seed, dropout.offset + number, out=out)
