"""Equations 1 to 6 (reference/linear.py) of whole layers on a CPU: the low-rank part of each is one call of csrc/cpu each way.

PyTorch has a pass over memory for each product and each mask; and of x[8, 32] the way to its operations takes 20 to 60 µs. The
base product is its own, so that with B = 0 the result is the base layer's, bit for bit.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import cpu_extension
from ...mask import keep_scale, threshold
from ...nf4 import NF4Weight
from ...plan import PLAIN, Call, Layout
from ...values import Dropout, Grads, LoRAWeights, Needs
from ..products import accumulate
from . import nf4_product, whole
from .engine import members_backward
from .nf4 import one_tile

TINY = 1 << 17  # multiplications of a product up to which csrc/cpu's own loop is faster than the way to PyTorch's
# Forward and backward of 256 rows, 576 to 2048 features, dropout, beside PyTorch's products: 1 to 14 % of a layer faster at
# R = 8, the same at 32, up to 10 % slower at 64 (AMD EPYC with AVX2, one and two threads).
MAX_R = 32


def fits(call: Call) -> bool:
    """Whether csrc/cpu can address all matrices of a call that is whole, with adjacent rows, and some member is adapted."""
    if call.device.type != "cpu" or cpu_extension.extension is None or not _addressed(call.x):
        return False
    adapted = [member for member in call.members if member.lora_A is not None]
    return bool(adapted) and all(_fits(member, call) for member in adapted)


def _fits(member: LoRAWeights, call: Call) -> bool:
    A, B, R = member.lora_A, member.lora_B, member.lora_A.shape[0]  # type: ignore[union-attr]
    tiny = whole.rows_of_kind(call) * R * sum(member.weight.shape) <= TINY
    return (tiny or R <= MAX_R) and _addressed(A) and _addressed(B)  # type: ignore[arg-type]


def _addressed(layout: Layout) -> bool:
    return layout.plain and layout.stride == (layout.shape[1], 1)


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: every member's y[M,N] and h[M,R]."""
    pairs = [_forward_of(x, member, dropout, i) for i, member in enumerate(members)]
    return tuple([y for y, _ in pairs]), tuple([h for _, h in pairs])


def _forward_of(x: Tensor, member: LoRAWeights, dropout: Dropout | None, number: int) -> tuple[Tensor, Tensor | None]:
    (W, A, B, c, s, _), M, dtype = member, x.shape[0], x.dtype
    y = nf4_product.linear(x, W, c) if isinstance(W, NF4Weight) else F.linear(x, W, c)
    if A is None:
        return y, None
    N, R = B.shape
    h = torch.empty((M, R), dtype=dtype, device=x.device)
    read, mask = (x.data_ptr(), A.data_ptr(), B.data_ptr()), NO_MASK if dropout is None else mask_of(dropout, number)
    sizes, written = (M, A.shape[1], N, R), (y.data_ptr(), h.data_ptr())
    cpu_extension.extension.low_rank_forward(*read, *sizes, float(s), *mask, dtype.itemsize, *written, torch.get_num_threads())
    return y, h


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6, as linear.backward in this folder; those of a dy whose rows lie apart as in whole.py."""
    if any(dy is not None and not (type(dy) is Tensor and dy.is_contiguous()) for dy in dys):
        return whole.backward(dys, x, members, hs, dropout, needs)
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
    (W, A, B, _, s, _), (M, N), dtype, device = member, dy.shape, dy.dtype, dy.device
    R = 0 if B is None and h is None else (h if B is None else B).shape[1]
    K = W.shape[1] if need_x else x.shape[1] if "lora_A" in wanted else 0
    found, W_address = {}, 0
    if need_x:
        W = one_tile(W, dtype) if isinstance(W, NF4Weight) else W
        if dx is not None:
            accumulate(dx, dy, W)
        elif R and M * N * K <= TINY and W.is_contiguous() and type(W) in PLAIN:
            dx, W_address = torch.empty((M, K), dtype=dtype, device=device), W.data_ptr()
        else:
            dx = dy @ W
    if "lora_A" in wanted:
        found["lora_A"] = torch.empty((R, K), dtype=dtype, device=device)
    if "lora_B" in wanted:
        found["lora_B"] = torch.empty((N, R), dtype=dtype, device=device)
    if "bias" in wanted:
        found["bias"] = torch.empty((N,), dtype=dtype, device=device)
    read, written = (x, A, B, h), (dx if A is not None else None, *map(found.get, ("lora_A", "lora_B", "bias")))
    *own, h_address = [0 if t is None else t.data_ptr() for t in read]
    gradients = [0 if t is None else t.data_ptr() for t in written]
    sizes, mask = (M, K, N, R), NO_MASK if dropout is None else mask_of(dropout, number)
    both, threads = (W_address, dy.data_ptr(), h_address), torch.get_num_threads()
    cpu_extension.extension.low_rank_backward(*own, *sizes, float(s), *mask, dtype.itemsize, *both, *gradients, threads)
    return dx, found


NO_MASK = (1.0, 0, 0, 0)  # the scale of what is kept, the threshold, the seed and the offset


def mask_of(dropout: Dropout, number: int) -> tuple[float, int, int, int]:
    """What csrc/cpu makes a member's mask of."""
    scale, edge = _of_p(dropout.p)
    return scale, edge, dropout.seed.item(), dropout.offset + number  # type: ignore[return-value]


@functools.lru_cache
def _of_p(p: float) -> tuple[float, int]:
    return keep_scale(p), threshold(p)
