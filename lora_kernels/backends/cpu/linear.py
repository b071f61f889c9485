"""Equations 1 to 6 (reference/linear.py) on a CPU: the low-rank part of a layer is one call of csrc/cpu each way.

PyTorch has a pass over memory for each product and each mask; and of x[8, 32] the way to its operations takes 20 to 60 µs. The
base product is PyTorch's. In float32 and float64 it comes first: with B = 0 the result is the base layer's, bit for bit. In 16
bits, and over a 4-bit weight of many tiles, the low-rank part comes first, in the dtype in which the product is added to it:
each is rounded once.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import cpu_extension
from ...cpu_extension import PLAIN
from ...cpu_extension import rows as rows_of
from ...dtypes import wide_dtype
from ...mask import keep_scale, threshold
from ...nf4 import NF4Weight
from ...plan import Call, Layout, Plan
from ...values import Dropout, Grads, LoRAWeights, Needs
from .. import magnitude
from ..products import accumulate, product_dtype
from ..torch import linear as pytorch
from ..torch import nf4_product
from ..torch.engine import add_backward_product, add_forward_product, members_backward, sum_dtype, to
from ..torch.magnitude import STEPS
from ..torch.nf4 import one_tile, tile_size

FIELDS = pytorch.FIELDS
WHY = "its loops pass over each matrix once, dropout's mask included"
TINY = 1 << 17  # multiplications of a product up to which csrc/cpu's own loop is faster than the way to PyTorch's
# Forward and backward of 64 and 512 rows, 576 and 2048 features, beside PyTorch's products on one thread of an AMD EPYC (AVX2):
# with dropout a layer is 7 to 34 % faster at R = 8 and up to 19 % at 32, at 64 up to 9 % slower, at 128 up to 21 %. bfloat16
# gains 3 to 33 % at 8, and is the same at 64.
MAX_R = 32


def plan(call: Call) -> Plan | str:
    """The loops of csrc/cpu for this call, or the reason why there are none."""
    if (reason := refusal(call)) is not None:
        return reason
    functions = forward, backward
    return Plan("cpu", WHY, *(magnitude.around(functions, STEPS) if "magnitude" in call.fields else functions))


def refusal(call: Call, segments: int = 1) -> str | None:
    """Why csrc/cpu cannot compute a call's linear layers, or with "auto" is not the fastest; None. segments: of its rows."""
    if call.device.type != "cpu":
        return f"its loops are a CPU's, this call is on {call.device.type}"
    if cpu_extension.extension is None:
        return cpu_extension.why_not
    tensors = [call.x, *(t for member in call.members for t in member[:4] if isinstance(t, Layout))]
    if not all(t.plain for t in tensors):
        return "a tensor of this call is of a class of its own, whose elements may lie anywhere"
    if call.setting == "auto" and (ranks := [R for member in call.members if (R := _large_rank(member, call, segments))]):
        return f"PyTorch's products are faster at rank {max(ranks)}, from {MAX_R + 1} on"
    return None


def _large_rank(member: LoRAWeights, call: Call, segments: int) -> int:
    """R, if it is one with which csrc/cpu is slower; else 0."""
    if member.lora_A is None:
        return 0
    R, K = member.lora_A.shape[-2:]
    rows = (1 << (call.rows - 1).bit_length() if call.rows else 0) // segments
    return R if R > MAX_R and rows * R * (K + member.lora_B.shape[-2]) > TINY else 0


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None, first: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Equations 1 and 2: every member's y[M,N] in x's dtype, and its h[M,R] in A's. first: the mask's row of x's first one."""
    x = adjacent(x)
    ys, hs = zip(*[_forward_of(x, member, dropout, i, first) for i, member in enumerate(members)], strict=True)
    return ys, hs


def _forward_of(
    x: Tensor, member: LoRAWeights, dropout: Dropout | None, number: int, first: int
) -> tuple[Tensor, Tensor | None]:
    (W, A, B, c, s, _), M, h = member, x.shape[0], None
    before = product_is_first(x, W)
    if before:
        y = nf4_product.linear(x, W, c) if isinstance(W, NF4Weight) else F.linear(x, W, c)
    else:
        y = x.new_empty((M, W.shape[0]), dtype=sum_dtype(x, W))
    if A is not None:
        A, B, (R, K) = adjacent(A), adjacent(B), A.shape
        h = A.new_empty((M, R))
        term = rows_of(x), rows_of(A), rows_of(B), M, K, W.shape[0], R, float(s), *mask_of(dropout, number), first
        c = None if c is None or before else c.contiguous()
        cpu_extension.extension.low_rank_forward(*term, rows_of(c), rows_of(y), before, rows_of(h), torch.get_num_threads())
    elif not before:
        y = y.zero_() if c is None else y.copy_(c)
    return y if before else to(add_forward_product(y, x, W), x.dtype), h


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6, as linear.backward of backends/torch."""
    dtype = None
    for dy in dys:
        if dy is not None:
            dtype = dy.dtype
            if type(dy) not in PLAIN:
                return pytorch.backward(dys, x, members, hs, dropout, needs)
    dx, found = members_backward(dys, adjacent(x), members, hs, needs, _backward_of, dropout, len(members) == 1)
    return Grads(None if dx is None else to(dx, dtype), found)


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
    alone: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(dx with one member's part, its wanted gradients but W's). alone: dx has no other member's part."""
    dy, A, B, h = adjacent(dy), adjacent(member.lora_A), adjacent(member.lora_B), adjacent(h)
    W, s, (M, N) = member.weight, member.scaling, dy.shape
    R = 0 if B is None and h is None else (h if B is None else B).shape[1]
    K = W.shape[1] if need_x else x.shape[1] if "lora_A" in wanted else 0
    small, before, add = None, need_x and product_is_first(dy, W), dx is not None
    if before and dx is None and A is not None and M * N * K <= TINY and _multiplied_by_csrc(W, A):
        small, before, dx = W, False, dy.new_empty((M, K))
    elif before:
        W, add = one_tile(W, dy.dtype) if isinstance(W, NF4Weight) else W, True
        dx = dy @ W if dx is None else accumulate(dx, dy, W)
    elif need_x and dx is None:
        # 16-bit sums of several members' parts would be rounded once for each
        dx = dy.new_empty((M, K), dtype=sum_dtype(dy, W) if alone else product_dtype(dy.dtype, dy.device))
        dx = dx if A is not None else dx.zero_()
    dA = B.new_empty((R, K)) if "lora_A" in wanted else None
    dB = h.new_empty((N, R)) if "lora_B" in wanted else None
    dc = dy.new_empty((N,), dtype=wide_dtype(dy.dtype)) if "bias" in wanted else None
    term = rows_of(x), rows_of(A), rows_of(B), M, K, N, R, float(s), *mask_of(dropout, number), 0
    read = rows_of(small), rows_of(dy), rows_of(h)
    written = rows_of(None if A is None else dx), rows_of(dA), rows_of(dB), rows_of(dc)
    cpu_extension.extension.low_rank_backward(*term, *read, *written, add, torch.get_num_threads())
    found = {name: grad for name, grad in (("lora_A", dA), ("lora_B", dB), ("bias", dc)) if grad is not None}
    return dx if not need_x or before or small is not None else add_backward_product(dx, dy, W), found


def product_is_first(t: Tensor, W: Tensor | NF4Weight) -> bool:
    """Whether the low-rank part is added to the product of t with W, and not the other way round."""
    return t.dtype.itemsize >= 4 and not (isinstance(W, NF4Weight) and W.numel() > tile_size(t.device))


def _multiplied_by_csrc(W: Tensor | NF4Weight, A: Tensor) -> bool:
    """Whether csrc/cpu can address a float32 or float64 W, and computes in its dtype.

    Fewer columns than a vector has it sums up term by term: at K = 1, N = 283 2.7 times the error of PyTorch's sums in parts.
    """
    return type(W) in PLAIN and W.stride(1) == 1 and A.dtype.itemsize <= W.dtype.itemsize and W.shape[1] >= 8


def adjacent(t: Tensor | None) -> Tensor | None:
    """t, or a copy, with rows whose elements are adjacent."""
    return t if t is None or t.stride()[-1] == 1 else t.contiguous()


NO_MASK = (1.0, 0, 0, 0)  # the scale of what is kept, the threshold, the seed and the offset


def mask_of(dropout: Dropout | None, number: int) -> tuple[float, int, int, int]:
    """What csrc/cpu makes a member's mask of."""
    if dropout is None:
        return NO_MASK
    scale, edge = scale_and_threshold(dropout.p)
    return scale, edge, dropout.seed.item(), dropout.offset + number  # type: ignore[return-value]


@functools.lru_cache
def scale_and_threshold(p: float) -> tuple[float, int]:
    """What csrc/cpu multiplies the kept values by, and the least 16-bit lane that keeps one."""
    return keep_scale(p), threshold(p)
