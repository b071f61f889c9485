"""Equations 1 to 6 (reference/linear.py) of one layer on a CPU whose low-rank part is small: one call of csrc/cpu each way.

PyTorch takes 20 to 60 µs for the way to the low-rank products of x[8, 32], the products themselves take 3. The base product is
its own, so that with B = 0 the result is the base layer's, bit for bit.
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
from ..products import weight_gradient
from . import whole
from .nf4 import one_tile

LIMIT = 1 << 17  # multiplications up to which csrc/cpu is faster than PyTorch's operations: M·R·(K + N), M·K·N


def fits(call: Call) -> bool:
    """Whether a call that is whole is small too, and csrc/cpu can address all its matrices, with adjacent rows."""
    if len(call.members) != 1 or call.device.type != "cpu" or cpu_extension.extension is None:
        return False
    member = call.members[0]
    if member.lora_A is None:
        return False
    size = whole.rows_of_kind(call) * member.lora_A.shape[0] * sum(member.weight.shape)
    return size <= LIMIT and all(t.plain and _adjacent(t) for t in (call.x, member.lora_A, member.lora_B))


def _adjacent(layout: Layout) -> bool:
    return layout.stride == (layout.shape[1], 1)


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Equations 1 and 2: y[M,N] and h[M,R]."""
    (W, A, B, c, s), M, (N, R), dtype = members[0], x.shape[0], members[0].lora_B.shape, x.dtype
    y = F.linear(x, one_tile(W, dtype) if isinstance(W, NF4Weight) else W, c)
    h = torch.empty((M, R), dtype=dtype, device=x.device)
    read, mask = (x.data_ptr(), A.data_ptr(), B.data_ptr()), NO_MASK if dropout is None else mask_of(dropout)
    sizes, written = (M, A.shape[1], N, R), (y.data_ptr(), h.data_ptr())
    cpu_extension.extension.low_rank_forward(*read, *sizes, float(s), *mask, dtype.itemsize, *written, torch.get_num_threads())
    return (y,), (h,)


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6, as linear.backward in this folder; those of a dy whose rows lie apart as in whole.py."""
    (W, A, B, _, s), dy, h, wanted = members[0], dys[0], hs[0], needs.members[0]
    if type(dy) is not Tensor or not dy.is_contiguous():
        return whole.backward(dys, x, members, hs, dropout, needs)
    (M, N), dtype, device = dy.shape, dy.dtype, dy.device
    R = 0 if B is None and h is None else (h if B is None else B).shape[1]
    K = W.shape[1] if needs.x else x.shape[1] if "lora_A" in wanted else 0
    dx, found, W_address = None, {}, 0
    if needs.x:
        W = one_tile(W, dtype) if isinstance(W, NF4Weight) else W
        if M * N * K <= LIMIT and W.is_contiguous() and type(W) in PLAIN:
            dx, W_address = torch.empty((M, K), dtype=dtype, device=device), W.data_ptr()
        else:
            dx = dy @ W
    if "lora_A" in wanted:
        found["lora_A"] = torch.empty((R, K), dtype=dtype, device=device)
    if "lora_B" in wanted:
        found["lora_B"] = torch.empty((N, R), dtype=dtype, device=device)
    if "bias" in wanted:
        found["bias"] = torch.empty((N,), dtype=dtype, device=device)
    read, written = (x, A, B, h), (dx, found.get("lora_A"), found.get("lora_B"), found.get("bias"))
    *own, h_address = [0 if t is None else t.data_ptr() for t in read]
    gradients, mask = [0 if t is None else t.data_ptr() for t in written], NO_MASK if dropout is None else mask_of(dropout)
    cpu_extension.extension.low_rank_backward(
        *own, M, K, N, R, float(s), *mask, dtype.itemsize, W_address, dy.data_ptr(), h_address, *gradients, torch.get_num_threads()
    )
    if "weight" in wanted:
        found["weight"] = weight_gradient(dy, x)
    return Grads(dx, (found,))


NO_MASK = (1.0, 0, 0, 0)  # the scale of what is kept, the threshold, the seed and the offset


def mask_of(dropout: Dropout) -> tuple[float, int, int, int]:
    """What csrc/cpu makes a mask of."""
    scale, edge = _of_p(dropout.p)
    return scale, edge, dropout.seed.item(), dropout.offset  # type: ignore[return-value]


@functools.lru_cache
def _of_p(p: float) -> tuple[float, int]:
    return keep_scale(p), threshold(p)
