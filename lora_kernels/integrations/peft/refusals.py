"""The reasons in the tensors of a call why PEFT's own forward has to compute; `AccelerationReport.calls` counts them."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...dtypes import FLOATS, autocast_dtype
from ...layers import linear_4bit
from ...layers.frozen_weight import is_linear4bit
from ...layers.offload import execution_device, offloading_hooks
from ...plan import PLAIN
from .parts import Factor, Parts, fast_parts, held, modules_of, tensors_of

EMPTY: dict[int, torch.device] = {}


def why_not_at_present(layer: LoraLayer) -> str | None:
    """Why every call of the layer goes to PEFT's own forward as long as the layer is as it is now."""
    parts = fast_parts(layer)
    if isinstance(parts, str):
        return parts
    return why_not_parameters(layer, parts, _brought_to(parts))


def _brought_to(parts: Parts) -> dict[int, torch.device]:
    """Where offloading hooks put, at a call, the tensors that they keep on the meta device; by id."""
    brought: dict[int, torch.device] = {}
    for module in modules_of(parts):
        if type(module) is not Factor and offloading_hooks(module):
            device = torch.empty(0, device=execution_device(module)).device  # with its index
            brought |= {id(t): device for t in module.parameters() if t.is_meta}
    return brought


def is_plain(layer: Any, parts: Parts, tensors: tuple[Any, ...], x: Tensor) -> bool:
    """Whether lora_linear takes the tensors as they are, and refuses whatever may be wrong with them."""
    W, c, A, B, b, m = tensors
    return (
        type(x) in PLAIN
        and type(W) in PLAIN
        and type(A) in PLAIN
        and type(B) in PLAIN
        and (c is None or (type(c) in PLAIN and c.dtype == W.dtype))
        and (m is None or (type(m) in PLAIN and x.ndim != 1))
        and not W.requires_grad
        and b is None
        and held(parts.lora_A, "bias") is None
        and (x.dtype == A.dtype or layer.cast_input_dtype_enabled)
        and not torch._C._are_functorch_transforms_active()
        and type(parts.base).forward is nn.Linear.forward
    )


def why_not_tensors(layer: LoraLayer, parts: Parts, x: Tensor) -> str | None:
    if (reason := why_not_parameters(layer, parts) or why_not_input(layer, parts, x)) is not None:
        return reason
    fits = x.ndim > 0 and x.shape[-1] == layer.in_features
    return None if fits else "x does not have in_features columns"


def why_not_parameters(layer: LoraLayer, parts: Parts, brought: Mapping[int, torch.device] = EMPTY) -> str | None:
    """A reason that holds for every x, so that a report can name it before a call.

    brought: by id, where tensors will be then that are elsewhere now.
    """
    base, lora_A, _, _, scaling, _ = parts
    W, c, A, B, b, m = tensors_of(parts)
    four_bit = is_linear4bit(base)
    device = _place(W, brought)
    for t in (A, B, c, b, m) if four_bit else (W, A, B, c, b, m):
        if t is not None and (reason := _why_not_tensor(t, device, brought)):
            return reason
    if W.requires_grad:
        return "the base weight is trained"
    if lora_A.bias is not None:
        return "lora_A has a bias"
    if b is not None and m is not None:
        return "DoRA with a bias of lora_B, which PEFT's norm takes for a part of the weight"
    (K, N), R = (layer.in_features, layer.out_features), A.shape[0]
    shape = W.shape if not four_bit else (N, K)
    if (
        shape != ((K, N) if isinstance(base, Conv1D) else (N, K))
        or A.shape != (R, K)
        or B.shape != (N, R)
        or (m is not None and m.shape != (N,))
    ):
        return "parameters are sharded, or have other shapes than the layer's"
    if A.dtype != B.dtype:
        return "lora_A and lora_B differ in dtype"
    return (linear_4bit.why_not_weight(base) if four_bit else None) or _why_not_scaling(scaling, device)


def why_not_input(layer: LoraLayer, parts: Parts, x: Tensor) -> str | None:
    """A reason in x, but for its columns, and in what surrounds the call; the parameters are right."""
    base, dtype = parts.base, parts.lora_A.weight.dtype
    if (reason := _why_not_tensor(x, base.weight.device)) is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if x.dtype != dtype and not layer.cast_input_dtype_enabled:
        return "casting of the input is disabled"
    if parts.magnitude is not None and x.ndim == 1:
        return "DoRA of a vector, which PEFT returns as a row"
    return linear_4bit.why_not_input(base, x) if is_linear4bit(base) else _why_not_dtypes(x, base.weight, base.bias)


def _why_not_tensor(t: Tensor, device: torch.device, brought: Mapping[int, torch.device] = EMPTY) -> str | None:
    if type(t) not in PLAIN:
        return f"a {type(t).__name__} among the tensors"
    if t.dtype not in FLOATS:
        return f"a tensor of {t.dtype}"
    return "tensors on different devices" if _place(t, brought) != device else None


def _place(t: Tensor, brought: Mapping[int, torch.device]) -> torch.device:
    return brought.get(id(t), t.device) if brought else t.device  # an id in a compiled graph is a graph for each tensor


def _why_not_dtypes(x: Tensor, W: Tensor, c: Tensor | None) -> str | None:
    autocast = autocast_dtype(x.device) is not None and torch.float64 not in (x.dtype, W.dtype)
    if not autocast and (x.dtype != W.dtype or (c is not None and c.dtype != W.dtype)):
        return "x, weight and bias differ in dtype"
    return None


def _why_not_scaling(scaling: Any, device: torch.device) -> str | None:
    if isinstance(scaling, (int, float)):
        return None
    if type(scaling) not in PLAIN:
        return f"scaling is a {type(scaling).__name__}"
    fits = scaling.ndim == 0 and scaling.is_floating_point() and scaling.device in (device, torch.device("cpu"))
    return None if fits and not scaling.requires_grad else "scaling is no constant 0-d tensor"
