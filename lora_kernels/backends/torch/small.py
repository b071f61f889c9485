"""Equations 1 to 6 (reference/linear.py) of one small layer on a CPU, in one call of csrc/cpu each way; else as in whole.py.

PyTorch takes 30 to 100 µs for the way to the products of x[8, 32], the products themselves take 5.
"""

from typing import Any

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
    """Whether a call that is whole is small too, and all its matrices have adjacent rows."""
    if len(call.members) != 1 or call.device.type != "cpu" or not _adjacent(call.x):
        return False
    layouts = call.members[0][:4]
    size = whole.rows_of_kind(call) * layouts[0].shape.numel()
    return size <= PRODUCT and all(layout is None or _adjacent(layout) for layout in layouts)


def _adjacent(layout: Layout) -> bool:
    return layout.quant_type is not None or layout.stride in ((layout.shape[-1], 1), (1,))


def forward(
    x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Equations 1 and 2: y[M,N] and h[M,R]."""
    W, A, B, c, s = members[0]
    if isinstance(W, NF4Weight):
        W = one_tile(W, x.dtype)
    if not cpu_extension.takes(x, W, A, B, c):
        return whole.forward(x, members, dropout)
    (M, K), (N, R) = x.shape, B.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    h = torch.empty((M, R), dtype=x.dtype, device=x.device)
    layer = _layer(x, W, A, B, M, K, N, R, s, dropout)
    cpu_extension.extension.small_forward(layer, _address(c), y.data_ptr(), h.data_ptr(), x.dtype.itemsize)
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
    if isinstance(W, NF4Weight):
        W = one_tile(W, dy.dtype)
    if "weight" in wanted or not dy.is_contiguous() or not cpu_extension.takes(dy, x, W, A, B, h):
        return whole.backward(dys, x, members, hs, dropout, needs)
    M, N = dy.shape
    R = 0 if B is None and h is None else (h if B is None else B).shape[1]
    K = W.shape[1] if needs.x else x.shape[1] if "lora_A" in wanted else 0
    sizes = {"lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    dx = torch.empty((M, K), dtype=dy.dtype, device=dy.device) if needs.x else None
    found = {name: torch.empty(sizes[name], dtype=dy.dtype, device=dy.device) for name in wanted}
    gradients = [_address(t) for t in (dx, found.get("lora_A"), found.get("lora_B"), found.get("bias"))]
    layer = _layer(x, W, A, B, M, K, N, R, s, dropout)
    cpu_extension.extension.small_backward(layer, dy.data_ptr(), _address(h), *gradients, dy.dtype.itemsize)
    return Grads(dx, (found,))


def _layer(
    x: Tensor | None,
    W: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    M: int,
    K: int,
    N: int,
    R: int,
    s: float,
    dropout: Dropout | None,
) -> Any:
    """What both directions of csrc/cpu take; a matrix that a gradient does not read may be None."""
    mask: tuple[Any, ...] = (1.0, 0, 0, 0)
    if dropout is not None:
        mask = keep_scale(dropout.p), threshold(dropout.p), dropout.seed.item(), dropout.offset
    return cpu_extension.extension.SmallLayer(_address(x), _address(W), _address(A), _address(B), M, K, N, R, s, *mask)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
