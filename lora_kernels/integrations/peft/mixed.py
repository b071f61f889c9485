"""PEFT's `adapter_names=`, an adapter for each sample of a batch, as one multi_lora_linear in the place of a loop."""

from typing import Any

from torch import Tensor

from ...functional.grouped_linear import multi_lora_linear
from ...layers.frozen_weight import is_linear4bit
from ...layers.mixed import Mixed, segments_of
from ...layers.offload import forward_is_replaced
from ...values import LoRAAdapter, LoRAWeights
from .parts import dropout_p, modules_of, parts_of, tensors_of
from .refusals import why_not_tensors

BASE = "__base__"  # PEFT's name for no adapter


def computed(layer: Any, x: Tensor, names: list[str], weights_of: Any) -> Tensor | str:
    """y, each sample with its adapter; or the reason why PEFT's own loop has to compute. PEFT's checks raise as there."""
    layer._check_forward_args(x, adapter_names=names)
    if layer.disable_adapters:
        return "adapters are disabled"
    known = layer._modules["lora_A"]
    wanted = tuple(dict.fromkeys(name for name in names if name != BASE and name in known))
    found = [_weights(layer, name, x, weights_of) for name in wanted]
    if not found:
        return "no adapter of a mixed batch is the layer's"
    if reasons := [member for member in found if isinstance(member, str)]:
        return reasons[0]
    members: list[tuple[LoRAWeights, float]] = found  # type: ignore[assignment]
    if len({member.lora_A.dtype for member, _ in members}) > 1:  # type: ignore[union-attr]
        return "the adapters of a mixed batch differ in dtype"
    adapters = [LoRAAdapter(m.lora_A, m.lora_B, m.scaling, p) for m, p in members]  # type: ignore[arg-type]
    base = members[0][0]
    y = multi_lora_linear(x, base.weight, adapters, segments_of(x, Mixed(tuple(names), wanted)), base.bias)
    return y.to(x.dtype) if is_linear4bit(layer._modules["base_layer"]) else y


def _weights(layer: Any, name: str, x: Tensor, weights_of: Any) -> tuple[LoRAWeights, float] | str:
    """One adapter's projection and dropout, or why it has to be PEFT's own to compute."""
    parts = parts_of(layer, name)
    if isinstance(parts, str):
        return parts
    if parts.magnitude is not None or tensors_of(parts)[4] is not None:
        return "an adapter of a mixed batch has more than A and B"
    if any("forward" in module.__dict__ and forward_is_replaced(module) for module in modules_of(parts)):
        return "accelerate's hooks move the layer's tensors"
    return why_not_tensors(layer, parts, x) or (weights_of(parts, tensors_of(parts)), dropout_p(parts.dropout))
