"""PEFT's LoRA layers with this package's forward: y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c, and DoRA's.

Only `forward` differs from PEFT's classes, so an existing layer changes its class and keeps its parameters, keys and methods.
Each call looks for a reason against it first; where there is one, PEFT's own forward computes, and the reason is counted.
"""

from collections import Counter
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ...functional.linear import lora_linear
from ...layers.frozen_weight import is_linear4bit
from ...layers.linear import bias_sum
from ...layers.linear_4bit import nf4_weight
from ...layers.offload import call_onloaded, forward_is_replaced
from ...layers.projection import Projection, projection, why_not_called
from ...values import LoRAWeights
from . import mixed
from .parts import NONE_ACTIVE, Parts, dropout_p, fast_parts, modules_of, tensors_of
from .refusals import is_plain, why_not_input, why_not_parameters, why_not_tensors

FAST = "fast"
CALLS = "_lora_kernels_calls"  # the layer's counter: how many calls went fast, and why others did not


class ShownAsPeft(type(lora.Linear)):  # type: ignore[misc]
    """Prints the class as PEFT's own, so that PEFT's messages about a layer read as they did."""

    def __repr__(cls) -> str:
        return repr(cls.__bases__[-1])


class Shown:
    """What a layer of PEFT's prints although its class is another."""

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Accelerated")  # shown as "lora.Linear(", which tools look for

    def extra_repr(self) -> str:
        return "accelerated by lora_kernels"


class Accelerated(Shown):
    """The forward of both classes; it stands before PEFT's class in the order of methods."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and len(kwargs) == 1 and (names := kwargs.get("adapter_names")) is not None:
            y = mixed.computed(self, x, names, weights_of)
        else:
            parts = "extra arguments" if args or kwargs else fast_parts(self)
            y = parts if isinstance(parts, str) else _computed(self, parts, x)
        count(self, y)
        return super().forward(x, *args, **kwargs) if isinstance(y, str) else y  # type: ignore[misc]

    def projection(self: Any, x: Tensor) -> Projection | str:
        """What `forward` computes of such an x, or the reason why PEFT's own forward has to, or alone can."""
        parts = fast_parts(self)
        if parts == NONE_ACTIVE:  # a plain layer
            return why_not_called(self.base_layer) or projection(self.base_layer, x)
        if isinstance(parts, str):
            return parts
        if any("forward" in m.__dict__ and forward_is_replaced(m) for m in modules_of(parts)):
            return "accelerate's hooks move the layer's tensors"
        tensors = tensors_of(parts)
        if torch.compiler.is_compiling() or not is_plain(self, parts, tensors, x):
            reason = why_not_parameters(self, parts) or why_not_input(self, parts, x)
            if reason is not None:
                return reason
        if _widens(self, x, tensors[-1]):
            return "DoRA's result is wider than x"
        return Projection(weights_of(parts, tensors), dropout_p(parts.dropout), is_linear4bit(parts.base))

    def count_fused(self: Any) -> None:
        """Another's call has computed this layer's."""
        count(self, FAST)


class AcceleratedLinear(Accelerated, lora.Linear, metaclass=ShownAsPeft):
    """peft.tuners.lora.Linear over nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit, computed by lora_linear."""


def _computed(layer: Any, parts: Parts, x: Tensor) -> Tensor | str:
    """y, or the reason in the tensors why PEFT's own forward has to compute; accelerate's hooks bring offloaded ones first."""
    hooked = [m for m in modules_of(parts) if "forward" in m.__dict__ and forward_is_replaced(m)]
    if hooked:
        return call_onloaded(
            hooked, lambda x: why_not_tensors(layer, parts, x) or compute(layer, x, parts, tensors_of(parts)), x
        )
    tensors = tensors_of(parts)
    if torch.compiler.is_compiling() or not is_plain(layer, parts, tensors, x):
        return why_not_tensors(layer, parts, x) or compute(layer, x, parts, tensors)
    W, c, A, B, _, m = tensors
    try:
        return lora_linear(x, W, A, B, c, scaling=parts.scaling, dropout_p=dropout_p(parts.dropout), magnitude=m)
    except (TypeError, ValueError):  # arguments that do not fit: only now is it worth its time to look at each
        if (reason := why_not_tensors(layer, parts, x)) is None:
            raise
        return reason


def compute(layer: Any, x: Tensor, parts: Parts, tensors: tuple[Any, ...]) -> Tensor:
    """y = (m / n) ⊙ (x·Wᵀ + s·(drop(x)·Aᵀ·Bᵀ + b)) + c as a fresh tensor; without m / n where there is no m."""
    W, A, B, c, scaling, m = weights_of(parts, tensors)
    y = lora_linear(x, W, A, B, c, scaling=scaling, dropout_p=dropout_p(parts.dropout), magnitude=m)  # type: ignore[arg-type]
    if not is_linear4bit(parts.base):
        return y
    # Linear4bit returns x's dtype under autocast too
    return y.to(torch.promote_types(x.dtype, m.dtype) if _widens(layer, x, m) else x.dtype)  # type: ignore[union-attr]


def _widens(layer: Any, x: Tensor, m: Tensor | None) -> bool:
    """Whether PEFT's result is wider than x: over 4 bits, under a GPU's autocast, it leaves its product with m as it is."""
    if m is None or isinstance(layer, lora.Linear) or not torch.is_autocast_enabled():
        return False
    return torch.promote_types(x.dtype, m.dtype) != x.dtype


def weights_of(parts: Parts, tensors: tuple[Any, ...]) -> LoRAWeights:
    """The layer as lora_linear reads it: a bias c + s·b, W as [out, in] or in 4 bits."""
    (base, _, _, _, scaling, _), (W, c, A, B, b, m) = parts, tensors
    weight = nf4_weight(base) if is_linear4bit(base) else W.T if isinstance(base, Conv1D) else W
    return LoRAWeights(weight, A, B, c if b is None else bias_sum(c, b, scaling, weight.dtype), scaling, m)


def count(layer: LoraLayer, y: Tensor | str) -> None:
    """Not while a compiler traces: it would make the number a part of the graph."""
    if torch.compiler.is_compiling():
        return
    if (calls := layer.__dict__.get(CALLS)) is None:
        calls = layer.__dict__[CALLS] = Counter()
    calls[y if isinstance(y, str) else FAST] += 1
