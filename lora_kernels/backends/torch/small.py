"""Equations 1 to 6 (reference/linear.py) of one small layer on a CPU, in one call of csrc/cpu each way; else as in whole.py.

PyTorch takes 30 to 100 µs for the way to the products of x[8, 32], the products themselves take 5.
"""

import functools

import torch
from torch import Tensor

from ... import cpu_extension
from ...mask import keep_scale, threshold
from ...nf4 import NF4Weight
from ...plan import Call, Layout
from ...values import Dropout, Grads, LoRAWeights, Needs
from . import whole
from .nf4 import one_tile

PRODUCT = 1 << 17  # M·K·N up to which the calls are faster than PyTorch's operations: 8 x 128 x 128 takes 19 and 16 µs


def fits(call: Call) -> bool:
    """Whether a call that is whole is small too, and csrc/cpu can address all its matrices, with adjacent rows."""
    if len(call.members) != 1 or call.device.type != "cpu" or cpu_extension.extension is None:
        return False
    layouts = [layout for layout in (call.x, *call.members[0][:4]) if layout is not None]
    size = whole.rows_of_kind(call) * call.members[0].weight.shape.numel()
    return size <= PRODUCT and all(layout.plain and _adjacent(layout) for layout in layouts)


def _adjacent(layout: Layout) -> bool:
    return layout.quant_type is not None or layout.stride in ((layout.shape[-1], 1), (1,))


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Equations 1 and 2: y[M,N] and h[M,R]."""
    W, A, B, c, s = members[0]
    if isinstance(W, NF4Weight):
        W = one_tile(W, x.dtype)
    M, (N, R), dtype, device = x.shape[0], B.shape, x.dtype, x.device
    y, h = torch.empty((M, N), dtype=dtype, device=device), torch.empty((M, R), dtype=dtype, device=device)
    csrc, mask = cpu_extension.extension, NO_MASK if dropout is None else mask_of(dropout)
    layer = csrc.SmallLayer(x.data_ptr(), W.data_ptr(), A.data_ptr(), B.data_ptr(), M, A.shape[1], N, R, s, *mask)
    csrc.small_forward(layer, 0 if c is None else c.data_ptr(), y.data_ptr(), h.data_ptr(), dtype.itemsize)
    return (y,), (h,)


def backward(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: tuple[LoRAWeights, ...],
    hs: tuple[Tensor | None, ...],
    dropout: Dropout | None,
    needs: Needs,
) -> Grads:
    """Equations 3 to 6, as linear.backward in this folder; dW, and of a dy whose rows lie apart, as in whole.py."""
    (W, A, B, _, s), dy, h, wanted = members[0], dys[0], hs[0], needs.members[0]
    if "weight" in wanted or type(dy) is not Tensor or not dy.is_contiguous():
        return whole.backward(dys, x, members, hs, dropout, needs)
    if isinstance(W, NF4Weight):
        W = one_tile(W, dy.dtype)
    (M, N), dtype, device = dy.shape, dy.dtype, dy.device
    R = 0 if B is None and h is None else (h if B is None else B).shape[1]
    K = W.shape[1] if needs.x else x.shape[1] if "lora_A" in wanted else 0
    dx = dA = dB = dc = None
    if needs.x:
        dx = torch.empty((M, K), dtype=dtype, device=device)
    found = {}
    if "lora_A" in wanted:
        dA = found["lora_A"] = torch.empty((R, K), dtype=dtype, device=device)
    if "lora_B" in wanted:
        dB = found["lora_B"] = torch.empty((N, R), dtype=dtype, device=device)
    if "bias" in wanted:
        dc = found["bias"] = torch.empty((N,), dtype=dtype, device=device)
    read, written = [0 if t is None else t.data_ptr() for t in (x, W, A, B, h)], (dx, dA, dB, dc)
    csrc, mask = cpu_extension.extension, NO_MASK if dropout is None else mask_of(dropout)
    layer = csrc.SmallLayer(*read[:4], M, K, N, R, s, *mask)
    csrc.small_backward(layer, dy.data_ptr(), read[4], *[0 if t is None else t.data_ptr() for t in written], dtype.itemsize)
    return Grads(dx, (found,))


NO_MASK = (1.0, 0, 0, 0)  # the scale of what is kept, the threshold, the seed and the offset


def mask_of(dropout: Dropout) -> tuple[float, int, int, int]:
    """What csrc/cpu makes a mask of."""
    scale, edge = _of_p(dropout.p)
    return scale, edge, dropout.seed.item(), dropout.offset  # type: ignore[return-value]


@functools.lru_cache
def _of_p(p: float) -> tuple[float, int]:
    return keep_scale(p), threshold(p)
