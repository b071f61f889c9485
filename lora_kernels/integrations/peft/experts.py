"""PEFT's LoRA of experts' parameters (`target_parameters`), computed without the W + B·A of all experts that PEFT forms."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ...dtypes import FLOATS, autocast_dtype
from ...layers.experts import experts_forward, is_experts, sizes, stacked, weight_names
from ...layers.experts_4bit import quantized_stack, why_not_stacks
from ...layers.projection import why_not_called
from ...plan import PLAIN
from ...values import LoRAAdapter
from .linear import ShownAsPeft, count
from .parts import NONE_ACTIVE

OTHER_LAYOUT = "lora_A and lora_B have other shapes than the parameter's"
EXCHANGED = "in and out are exchanged, as in PEFT before 0.20"


class ParamWrapper(lora.ParamWrapper, metaclass=ShownAsPeft):
    """peft.tuners.lora.ParamWrapper over experts, or over another of their parameters' wrapper: the outermost computes.

    Its name is PEFT's, which looks for a class of that name where it adds an adapter.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        *wrappers, experts = chain(self)
        reason = "extra arguments" if len(args) != 2 or kwargs else why_not_input(x, experts)
        adapters = reason or adapters_of(wrappers, experts)
        if isinstance(adapters, str):
            count(self, adapters)
            return super().forward(x, *args, **kwargs)
        for wrapper in wrappers:
            count(wrapper, x)
        top_k_index, top_k_weights = args
        return experts_forward(experts, x, top_k_index, top_k_weights, adapters)


def chain(layer: Any) -> list[Any]:
    """The wrappers from `layer` on, one for each parameter, and the module that has the parameters."""
    found = [layer]
    while isinstance(found[-1], lora.ParamWrapper):
        found.append(found[-1].base_layer)
    return found


def why_not_experts(layer: Any) -> str | None:
    """Why a wrapper stays PEFT's own, whatever its state: what it wraps."""
    experts = chain(layer)[-1]
    if is_experts(experts) and layer.parameter_name in weight_names(experts):
        return None
    return (
        f"a lora.ParamWrapper, which adds B·A to the parameter {layer.parameter_name} itself (target_parameters): "
        f"{type(experts).__name__} is no experts class with that stack, as transformers' use_experts_implementation makes them"
    )


def why_not_at_present(layer: Any) -> str | None:
    """Why every call goes to PEFT's own forward as long as the wrappers from `layer` on are as they are now."""
    *wrappers, experts = chain(layer)
    adapters = adapters_of(wrappers, experts)
    return adapters if isinstance(adapters, str) else None


def adapters_of(wrappers: list[Any], experts: Any) -> dict[str, LoRAAdapter] | str:
    """The active adapters of each stack, or the reason in the present state why PEFT's own forward has to compute."""
    if any(type(wrapper) not in (ParamWrapper, lora.ParamWrapper) for wrapper in wrappers):
        return "a wrapper inside is a class of its own"
    for module in (*wrappers[1:], experts):
        if (reason := why_not_called(module)) is not None:
            return reason
    if (reason := why_not_stacks(experts, weight_names(experts))) is not None:
        return reason
    found: dict[str, LoRAAdapter] = {}
    for wrapper in wrappers:
        adapter = _adapter(wrapper, experts)
        if isinstance(adapter, str):
            return adapter
        if adapter is not None:
            found[wrapper.parameter_name] = adapter
    return found or NONE_ACTIVE


def _adapter(wrapper: Any, experts: Any) -> LoRAAdapter | str | None:
    if wrapper.disable_adapters:
        return "adapters are disabled"
    if wrapper.merged_adapters:
        return "adapters are merged"
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if len(names) != 1:
        return "several active adapters" if names else None
    modules, quantized = (wrapper.lora_A[names[0]], wrapper.lora_B[names[0]]), quantized_stack(experts, wrapper.parameter_name)
    for kind, module in zip(("lora_A", "lora_B"), modules, strict=True):
        if type(module) is not nn.Linear or module.bias is not None:
            return f"{kind} is a {type(module).__name__}, or has a bias"
        if (reason := why_not_called(module)) is not None:
            return reason.replace("a member", kind)
    A, B = modules[0].weight, modules[1].weight
    W = getattr(experts, wrapper.parameter_name) if quantized is None else quantized
    for t in (A, B) if quantized is not None else (W, A, B):
        if type(t) not in PLAIN or t.dtype not in FLOATS:
            return f"a {type(t).__name__} of {t.dtype} among the tensors"
        if t.device != W.device:
            return "tensors on different devices"
    if getattr(wrapper, "_did_swap_in_out_features", False) == experts.is_transposed:
        return EXCHANGED
    E, N, K = sizes(experts, W)
    if A.dtype != B.dtype:
        return "lora_A and lora_B differ in dtype"
    if A.shape[1] != K or B.shape[0] != N or A.shape[0] != B.shape[1] or A.shape[0] % E:
        return OTHER_LAYOUT
    return LoRAAdapter(*stacked(A, B, E), wrapper.scaling[names[0]])


def why_not_input(x: Tensor, experts: Any) -> str | None:
    """A reason in the tokens."""
    first = weight_names(experts)[0]
    W = quantized_stack(experts, first) or getattr(experts, first)
    if type(x) not in PLAIN or x.dtype not in FLOATS or x.device != W.device:
        return f"x is a {type(x).__name__} of {x.dtype} on {x.device}"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    return None if x.dtype == W.dtype or autocast_dtype(x.device) is not None else "x and the experts differ in dtype"
