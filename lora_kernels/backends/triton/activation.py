"""What lies between the two products of experts, by the gated MLP's kernels: one pass over h = [e | u], one over da and h."""

import torch
from torch import Tensor

from ...plan import PLAIN, use_backend
from ..torch import activation as pytorch
from .compilation import give_up
from .gpu import device_of
from .gpu import why_not as why_not_device
from .kernels.glu import glu
from .kernels.glu_backward import NOTHING, Down, glu_backward
from .kernels.tiles import adjacent

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NO_ADAPTERS, NEEDED = Down(None, None, None, False), NOTHING._replace(needed=True)


def why_not(h: Tensor) -> str | None:
    """None where the kernels can compute with such an h, otherwise the reason that they cannot."""
    if type(h) not in PLAIN or h.dtype not in DTYPES or not h.numel() or len(h) >= 1 << 31:
        return f"h is a {type(h).__name__} of {h.dtype}{list(h.shape)}, for which there are no kernels"
    return why_not_device(h.device, use_backend.current)


def activated(h: Tensor, activation: str, has_gate: bool) -> Tensor:
    """As backends/torch/activation.py."""
    try:
        with device_of(h):
            h = adjacent(h)
            e, u = h.chunk(2, dim=1) if has_gate else (None, h)
            return glu(e, u, None, None, activation, 2 if has_gate else 1)[0]
    except Exception as error:
        give_up(h.device, error, use_backend.current)
        return pytorch.activated(h, activation, has_gate)


def activated_backward(da: Tensor, h: Tensor, activation: str, has_gate: bool) -> Tensor:
    """As backends/torch/activation.py."""
    try:
        with device_of(h):
            h = adjacent(h)
            e, u = h.chunk(2, dim=1) if has_gate else (None, h)
            dh, gate = torch.empty_like(h), NEEDED if has_gate else NOTHING
            glu_backward(adjacent(da), e, u, NO_ADAPTERS, gate, NEEDED, activation, dh)
            return dh
    except Exception as error:
        give_up(h.device, error, use_backend.current)
        return pytorch.activated_backward(da, h, activation, has_gate)
