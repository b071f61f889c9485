"""The kinds of layers that are not linear and get adapters when target_modules names them: nn.Conv2d and nn.Embedding."""

from typing import Any

from torch import nn

from ..dtypes import FLOATS
from .adapters import AdaptedWeight
from .conv2d import LoRAConv2d, conv2d_shapes, why_not_conv2d
from .embedding import LoRAEmbedding, why_not_embedding
from .initialization import rewrites_weight
from .linear import LoRALinear
from .lora_experts import Planned
from .offload import forward_is_replaced


def is_other(module: nn.Module) -> bool:
    """Whether it is a layer of these kinds, plain or adapted, or of a class made of one."""
    return isinstance(module, (nn.Conv2d, nn.Embedding, LoRAConv2d, LoRAEmbedding))


def why_not_other(module: Any, *, dora: bool, adalora: bool, lora_bias: bool, init: bool | str) -> str | None:
    """Why a layer for which is_other is true cannot get an adapter with these options."""
    conv = isinstance(module, (nn.Conv2d, LoRAConv2d))
    name = "Conv2d" if conv else "Embedding"
    if dora or adalora:
        return f"{'DoRA' if dora else 'AdaLoRA'} of {'a' if conv else 'an'} {name}, which only linear layers have here"
    if not conv and (lora_bias or rewrites_weight(init)):
        return "an Embedding, which has no lora_bias, as in PEFT" if lora_bias else f"{init!r} of an Embedding"
    if isinstance(module, AdaptedWeight):
        return None
    if type(module) not in (nn.Conv2d, nn.Embedding):
        return f"a {type(module).__name__}, not an nn.{name}: its forward may differ"
    if forward_is_replaced(module):
        return "its forward was replaced on the instance, by accelerate's hooks for example, which only linear layers keep here"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is not a parameter (computed by a hook?)"
    if module.weight.dtype not in FLOATS:
        return f"its weight has dtype {module.weight.dtype}"
    return why_not_conv2d(module) if conv else why_not_embedding(module)


def adapted(module: nn.Module | Planned, quantize: str | None = None) -> AdaptedWeight:
    """The layer with adapters, none yet, over a plain one. quantize: of a linear layer or a stack."""
    if isinstance(module, Planned):
        return module.make(quantize)
    if isinstance(module, nn.Conv2d):
        return LoRAConv2d.from_conv(module, r=None)
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding.from_embedding(module, r=None)
    return LoRALinear.from_linear(module, r=None, quantize=quantize)


def plain(layer: AdaptedWeight) -> nn.Module:
    """The plain layer in the place of one with adapters."""
    return layer.to_linear() if isinstance(layer, LoRALinear) else layer.to_plain()  # type: ignore[operator]


def features(module: Any) -> tuple[int, int]:
    """(in, out) of a layer, plain or adapted: the sizes of the matrix W[out, in] that its weight is, or that a stack has."""
    if isinstance(module, Planned):
        return module.features
    if isinstance(module, (nn.Linear, AdaptedWeight)):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel(), module.out_channels
    return tuple(module.weight.shape)  # transformers' Conv1D, nn.Embedding


def adapter_shapes(module: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(A's, B's) of an adapter of this rank over a layer, plain or adapted."""
    if isinstance(module, AdaptedWeight):
        return module.adapter_shapes(r)
    if isinstance(module, nn.Conv2d):
        return conv2d_shapes(module, r)
    (K, N), R = features(module), r * (module.weight.shape[0] if isinstance(module, Planned) else 1)
    return (R, K), (N, R)


def is_embedding(module: nn.Module | Planned) -> bool:
    """Whether it is an embedding, plain or adapted, whose adapters have names of their own in PEFT."""
    return isinstance(module, (nn.Embedding, LoRAEmbedding))
