"""What a layer computes at present as one member of an operation on several (lora_linear_group, lora_glu_mlp).

A class of layers with adapters says so by its method `projection(x) -> Projection | str`, and may have `count_fused()`, which
is called where such an operation has computed the layer. Plain linear layers are known here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..dtypes import FLOATS
from ..plan import PLAIN
from ..values import LoRAWeights
from . import linear_4bit
from .experts_4bit import has_only_its_hooks
from .frozen_weight import is_conv1d, is_linear4bit
from .offload import forward_is_replaced


class Projection(NamedTuple):
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c; lora_A and lora_B are None for a plain layer."""

    weights: LoRAWeights
    dropout_p: float = 0.0
    returns_x_dtype: bool = False  # under autocast too, as bitsandbytes' Linear4bit does


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a layer of a class that has adapters, and can be a member."""
    return hasattr(type(module), "projection")


def is_member(module: nn.Module) -> bool:
    """Whether it is a layer that can be one member of several, adapted or plain."""
    return is_adapted(module) or type(module) is nn.Linear or is_conv1d(module) or is_linear4bit(module)


def features(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a member."""
    return tuple(module.weight.shape) if is_conv1d(module) else (module.in_features, module.out_features)


def projection(module: Any, x: Tensor) -> Projection | str:
    """What `module` computes of such an x, whatever its columns; or the reason why it has to compute alone."""
    if is_adapted(module):
        return module.projection(x)
    if "_hf_hook" in module.__dict__:
        return "accelerate's hooks move the layer's tensors"
    if is_linear4bit(module):
        reason = linear_4bit.why_not_weight(module) or linear_4bit.why_not_input(module, x)
        return reason or Projection(_plain(linear_4bit.nf4_weight(module), module.bias), 0.0, True)
    if is_conv1d(module):
        return Projection(_plain(module.weight.T, module.bias))
    return Projection(_plain(module.weight, module.bias)) if type(module) is nn.Linear else f"a {type(module).__name__}"


def _plain(weight: Any, bias: Tensor | None) -> LoRAWeights:
    return LoRAWeights(weight, None, None, bias)  # type: ignore[arg-type]


def why_not_called(module: nn.Module) -> str | None:
    """Why a member has to be called as a module: what its call does beside its class's forward."""
    own = module.__dict__
    if "forward" in own and forward_is_replaced(module):
        return "a member's forward was replaced on the instance"
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooked and not has_only_its_hooks(module):
        return "a member has hooks"
    return "global module hooks" if torch_module._has_any_global_hook() else None


def why_not_together(x: Any, members: list[Projection]) -> str | None:
    """Why one operation cannot compute the members of x: the tensors that it would be given."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms, or forward-mode AD"
    adapted = [member for member in members if member.weights.lora_A is not None]
    if not adapted:
        return "no adapted member"
    if any(member.dropout_p != adapted[0].dropout_p for member in adapted):
        return "the members' lora_dropout differ"
    for tensor in (x, *(t for member in members for t in member.weights)):
        if isinstance(tensor, Tensor) and type(tensor) not in PLAIN:
            return f"a {type(tensor).__name__} among the tensors"
    return None if x.dtype in FLOATS else f"x is of {x.dtype}"
