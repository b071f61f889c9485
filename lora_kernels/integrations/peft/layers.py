"""PEFT's LoRA layers with this package's forward: y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c.

Only `forward` differs from PEFT's classes, so an existing layer changes its class and keeps its parameters, keys and methods.
Each call looks for a reason against it first; where there is one, PEFT's own forward computes, and the reason is counted.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ...functional.linear import lora_linear
from ...layers.frozen_weight import is_linear4bit
from ...layers.linear import bias_sum
from ...nf4.weight import NF4Weight
from ...operation import FLOATS

FAST = "fast"
CALLS = "_lora_kernels_calls"  # the layer's counter: how many calls went fast, and why others did not
PLAIN = (Tensor, nn.Parameter)


class Parts(NamedTuple):
    """What one plain adapter of a layer computes with."""

    base: Any  # nn.Linear or Conv1D
    lora_A: Any  # nn.Linear
    lora_B: Any  # nn.Linear
    dropout: Any  # nn.Dropout or nn.Identity
    scaling: float | Tensor


class ShownAsPeft(type(lora.Linear)):  # type: ignore[misc]
    """Prints the class as PEFT's own, so that PEFT's messages about a layer read as they did."""

    def __repr__(cls) -> str:
        return repr(cls.__bases__[-1])


class Accelerated:
    """The forward of both classes; it stands before PEFT's class in the order of methods."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = "extra arguments" if args or kwargs else fast_parts(self)
        if not isinstance(parts, str):
            parts = _why_not_tensors(self, parts, x) or parts
        _count(self, parts)
        return super().forward(x, *args, **kwargs) if isinstance(parts, str) else compute(x, parts)  # type: ignore[misc]

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Accelerated")  # shown as "lora.Linear(", which tools look for

    def extra_repr(self) -> str:
        return "accelerated by lora_kernels"


class AcceleratedLinear(Accelerated, lora.Linear, metaclass=ShownAsPeft):
    """peft.tuners.lora.Linear over nn.Linear, transformers' Conv1D or bitsandbytes' Linear4bit, computed by lora_linear."""


def compute(x: Tensor, parts: Parts) -> Tensor:
    """y = x·Wᵀ + s·(drop(x)·Aᵀ·Bᵀ + b) + c as a fresh tensor; b is PEFT's lora_bias."""
    base, lora_A, lora_B, dropout, scaling = parts
    four_bit = is_linear4bit(base)
    weight = nf4_weight(base) if four_bit else base.weight.T if isinstance(base, Conv1D) else base.weight
    y = lora_linear(
        x,
        weight,
        lora_A.weight,
        lora_B.weight,
        bias_sum(base.bias, lora_B.bias, scaling, weight.dtype),
        scaling=scaling,
        dropout_p=dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0,
    )
    return y.to(x.dtype) if four_bit else y  # Linear4bit returns x's dtype under autocast too


def nf4_weight(base: Any) -> NF4Weight:
    """The weight of bitsandbytes' Linear4bit, its bytes shared."""
    return NF4Weight.from_bnb(base.weight, quant_state(base))


def quant_state(base: Any) -> Any:
    """Of a Linear4bit: at its weight, or where FSDP has replaced that, at the layer. None before it is quantised."""
    return getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)


def fast_parts(layer: LoraLayer) -> Parts | str:
    """What `compute` takes, or the reason in the layer's present state why PEFT's own forward has to compute."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged"
    adapters = layer.lora_A
    names = [name for name in layer.active_adapters if name in adapters]
    if len(names) != 1:
        return "several active adapters" if names else "no active adapter"
    name = names[0]
    if name in layer.lora_variant:
        return f"the variant {type(layer.lora_variant[name]).__name__}"
    parts = Parts(layer.base_layer, adapters[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name])
    return _why_not_modules(parts) or parts


def _why_not_modules(parts: Parts) -> str | None:
    base, lora_A, lora_B, dropout, _ = parts
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) and not is_linear4bit(base):
        return f"the base layer is a {type(base).__name__}"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}"
    for part, module in zip(Parts._fields, parts[:4], strict=False):
        if forward_is_replaced(module):
            return f"{part}'s forward was replaced on the instance"
        if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
            return f"{part} has hooks"
    return "global module hooks" if torch_module._has_any_global_hook() else None


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether an instance attribute hides the class's forward, as accelerate's hooks and X-LoRA do.

    accelerate leaves the class's own forward there, bound, when it removes a hook.
    """
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _why_not_tensors(layer: LoraLayer, parts: Parts, x: Tensor) -> str | None:
    base, lora_A, lora_B, _, scaling = parts
    W, c, A, B, b = base.weight, base.bias, lora_A.weight, lora_B.weight, lora_B.bias
    four_bit = is_linear4bit(base)
    for t in (x, A, B, c, b) if four_bit else (x, W, A, B, c, b):
        if t is None:
            continue
        if type(t) not in PLAIN:
            return f"a {type(t).__name__} among the tensors"
        if t.dtype not in FLOATS:
            return f"a tensor of {t.dtype}"
        if t.device != W.device:
            return "tensors on different devices"
    if W.requires_grad:
        return "the base weight is trained"
    if lora_A.bias is not None:
        return "lora_A has a bias"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    (K, N), R = (layer.in_features, layer.out_features), A.shape[0]
    shape = W.shape if not four_bit else (N, K)
    if shape != ((K, N) if isinstance(base, Conv1D) else (N, K)) or A.shape != (R, K) or B.shape != (N, R):
        return "parameters are sharded, or have other shapes than the layer's"
    if x.ndim == 0 or x.shape[-1] != K:
        return "x does not have in_features columns"
    if A.dtype != B.dtype:
        return "lora_A and lora_B differ in dtype"
    if x.dtype != A.dtype and not layer.cast_input_dtype_enabled:
        return "casting of the input is disabled"
    why_not_base = _why_not_4bit(base, x) if four_bit else _why_not_dtypes(x, W, c)
    return why_not_base or _why_not_scaling(scaling, x.device)


def _why_not_4bit(base: Any, x: Tensor) -> str | None:
    state = quant_state(base)
    if state is None or type(base.weight).__name__ not in ("Params4bit", "Parameter"):
        return f"the 4-bit weight is a {type(base.weight).__name__} that is not quantised"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked the 4-bit weight for its CPU kernel"
    if base.weight.numel() * base.weight.element_size() != (state.shape.numel() + 1) // 2:
        return "the 4-bit weight is sharded"
    if x.dtype == torch.float64:
        return "x is float64 over a 4-bit weight"
    if not base.compute_type_is_set:  # bitsandbytes does so at the first call
        base.set_compute_type(x)
        base.compute_type_is_set = True
    if torch.is_autocast_enabled(x.device.type) or base.compute_dtype in (None, x.dtype):
        return None
    # PEFT computes its adapter from x as it is. A CPU does the whole layer in float32 as fast as in 16 bits; a GPU would not.
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return None
    return "the 4-bit layer's compute_dtype is not x's dtype"


def _why_not_dtypes(x: Tensor, W: Tensor, c: Tensor | None) -> str | None:
    autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, W.dtype)
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


def _count(layer: LoraLayer, parts: Parts | str) -> None:
    """Not while a compiler traces: it would make the number a part of the graph."""
    if not torch.compiler.is_compiling():
        vars(layer).setdefault(CALLS, Counter())[parts if isinstance(parts, str) else FAST] += 1
