"""PEFT's `adapter_names=`, an adapter for each sample of a batch, as one multi_lora_linear in the place of a loop."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...functional.grouped_linear import multi_lora_linear
from ...layers.frozen_weight import is_linear4bit
from ...layers.mixed import Mixed, segments_of
from ...layers.offload import forward_is_replaced
from ...values import LoRAAdapter, LoRAWeights
from .parts import Parts, dropout_p, modules_of, parts_of, tensors_of
from .refusals import is_plain, why_not_tensors

BASE = "__base__"  # PEFT's name for no adapter


def computed(layer: Any, x: Tensor, names: list[str], weights_of: Callable[..., LoRAWeights]) -> Tensor | str:
    """y, each sample with its adapter; or the reason why PEFT's own loop has to compute. PEFT's checks raise as there."""
    layer._check_forward_args(x, adapter_names=names)
    if layer.disable_adapters:
        return "adapters are disabled"
    known = layer._modules["lora_A"]
    wanted = tuple(dict.fromkeys(name for name in names if name != BASE and name in known))
    found = [_parts(layer, name, x) for name in wanted]
    if reasons := [parts for parts in found if isinstance(parts, str)]:
        return reasons[0]
    if not found:
        return "no adapter of a mixed batch is the layer's"
    members: list[Parts] = found  # type: ignore[assignment]
    weights = [weights_of(parts, tensors_of(parts)) for parts in members]
    if len({w.lora_A.dtype for w in weights}) > 1:  # type: ignore[union-attr]
        return "the adapters of a mixed batch differ in dtype"
    adapters = [
        LoRAAdapter(w.lora_A, w.lora_B, w.scaling, dropout_p(parts.dropout))  # type: ignore[arg-type]
        for w, parts in zip(weights, members, strict=True)
    ]
    segments = segments_of(x, Mixed(tuple(names), wanted))
    try:
        y = multi_lora_linear(x, weights[0].weight, adapters, segments, weights[0].bias)
    except (TypeError, ValueError):  # arguments that do not fit: only now is it worth its time to look at each
        reasons = [reason for parts in members if (reason := why_not_tensors(layer, parts, x)) is not None]
        if not reasons:
            raise
        return reasons[0]
    return y.to(x.dtype) if is_linear4bit(layer._modules["base_layer"]) else y


def _parts(layer: Any, name: str, x: Tensor) -> Parts | str:
    """What one adapter computes with, or why it has to be PEFT's own to compute."""
    parts = parts_of(layer, name)
    if isinstance(parts, str):
        return parts
    tensors = tensors_of(parts)
    if parts.magnitude is not None or tensors[4] is not None:
        return "an adapter of a mixed batch has more than A and B"
    if any("forward" in module.__dict__ and forward_is_replaced(module) for module in modules_of(parts)):
        return "accelerate's hooks move the layer's tensors"
    return parts if is_plain(layer, parts, tensors, x) else why_not_tensors(layer, parts, x) or parts
