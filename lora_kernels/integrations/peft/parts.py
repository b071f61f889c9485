"""What a LoRA layer of PEFT's computes with, or the reason in its present state why PEFT's own forward has to compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ...layers.frozen_weight import is_linear4bit
from ...layers.offload import device_hook, forward_is_replaced

NONE_ACTIVE = "no active adapter"
LOW_RANK_DROPOUT = "_lora_kernels_low_rank_dropout"  # an attribute of layers whose DoRA drops x as lora_linear does
NAMES = ("base", "lora_A", "lora_B", "dropout", "magnitude")
DROPS_TWICE = 'DoRA with dropout, where PEFT drops x in the base product too (accelerate\'s dora_dropout="low_rank" does not)'


class Factor:
    """A or B of AdaLoRA, whose layers hold parameters and no modules, as a linear layer without bias and hooks."""

    def __init__(self, weight: Tensor):
        self.weight, self.bias, self._parameters = weight, None, {"weight": weight}


class Parts(NamedTuple):
    """What one plain adapter of a layer computes with."""

    base: Any  # nn.Linear or Conv1D
    lora_A: Any  # nn.Linear, or a Factor
    lora_B: Any
    dropout: Any  # nn.Dropout or nn.Identity
    scaling: float | Tensor
    magnitude: Any = None  # of DoRA, the module that holds m


def fast_parts(layer: Any) -> Parts | str:
    """What `compute` takes, or the reason in the layer's present state why PEFT's own forward has to compute."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged_adapters:
        return "adapters are merged"
    modules, active = layer._modules, layer.active_adapter  # nn.Module's own look-up takes a µs for each attribute
    adapters = modules["lora_A"] if "lora_E" in modules else modules["lora_A"]._modules
    names = [name for name in ([active] if isinstance(active, str) else active) if name in adapters]
    if len(names) != 1:
        return "several active adapters" if names else NONE_ACTIVE
    return parts_of(layer, names[0])


def parts_of(layer: Any, name: str) -> Parts | str:
    """What the layer computes with by this adapter, active or not, or the reason why PEFT's own forward has to."""
    modules = layer._modules
    adalora = "lora_E" in modules
    dropout = modules["lora_dropout"]._modules[name]
    magnitude = _magnitude(layer, name, dropout) if name in layer.lora_variant else None
    if isinstance(magnitude, str):
        return magnitude
    if adalora:
        A, B, E, ranknum = (modules[kind][name] for kind in ("lora_A", "lora_B", "lora_E", "ranknum"))
        if not A.shape[0]:
            return "an adapter of rank 0"
        if not A.device == E.device == ranknum.device:  # on the meta device until its file is loaded
            return "tensors on different devices"
        parts = Parts(modules["base_layer"], *_triplets(A, B, E, ranknum, layer.scaling[name], dropout))
    else:
        lora_B = modules["lora_B"]._modules[name]
        lora_A = modules["lora_A"]._modules[name]
        parts = Parts(modules["base_layer"], lora_A, lora_B, dropout, layer.scaling[name], magnitude)
    return _why_not_modules(parts) or parts


def _magnitude(layer: Any, name: str, dropout: nn.Module) -> nn.Module | str:
    """DoRA's module that holds m, or why the adapter is PEFT's own to compute.

    PEFT drops x in training as in x·Wᵀ + (m/n - 1)·drop(x)·Wᵀ + (m/n)·s·drop(x)·Aᵀ·Bᵀ: with a second base product.
    """
    variant = layer.lora_variant[name]
    if type(variant) is not DoraLinearVariant:
        return f"the variant {type(variant).__name__}"
    if dropout_p(dropout) and LOW_RANK_DROPOUT not in layer.__dict__:
        return DROPS_TWICE
    return layer._modules["lora_magnitude_vector"]._modules[name]


def _triplets(
    A: Tensor, B: Tensor, E: Tensor, ranknum: Tensor, alpha: float, dropout: nn.Module
) -> tuple[Factor, Factor, nn.Module, float | Tensor]:
    """AdaLoRA's parts behind the base: E ⊙ A, B and s = alpha / (ranknum + 1e-5).

    PEFT trains ranknum, unmeant, where the weight is not in a CPU's float32: s is then in A, for the gradient.
    """
    if ranknum.requires_grad and torch.is_grad_enabled():
        wide = torch.promote_types(A.dtype, torch.float32)
        return Factor((E * A * (alpha / (ranknum + 1e-5).to(wide))).to(A.dtype)), Factor(B), dropout, 1.0
    # read on a CPU, in a µs; to read it would wait for a GPU, and end a compiler's graph
    number = ranknum.item() if ranknum.is_cpu and not torch.compiler.is_compiling() else ranknum.detach()[0].float()
    return Factor(E * A), Factor(B), dropout, alpha / (number + 1e-5)


def _why_not_modules(parts: Parts) -> str | None:
    base, lora_A, lora_B, dropout, _, magnitude = parts
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) and not is_linear4bit(base):
        return f"the base layer is a {type(base).__name__}"
    if type(lora_A) not in (nn.Linear, Factor) or type(lora_B) not in (nn.Linear, Factor):
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"lora_dropout is a {type(dropout).__name__}"
    if magnitude is not None and type(magnitude) is not DoraLinearLayer:
        return f"lora_magnitude_vector is a {type(magnitude).__name__}"
    return why_not_called(modules_of(parts))


def why_not_called(modules: Sequence[Any], *, hooked: bool = False) -> str | None:
    """Why modules in the order of NAMES have to be called. hooked: accelerate's hooks, which move tensors, are a reason too."""
    for i, module in enumerate(modules):
        if type(module) is Factor:
            continue
        own = module.__dict__
        if "forward" in own and forward_is_replaced(module) and (hooked or device_hook(module) is None):
            return f"{NAMES[i]}'s forward was replaced on the instance"
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return f"{NAMES[i]} has hooks"
    return "global module hooks" if torch_module._has_any_global_hook() else None


def modules_of(parts: Parts) -> tuple[Any, ...]:
    """Those that PEFT's forward calls, in the order of NAMES."""
    base, lora_A, lora_B, dropout, _, magnitude = parts  # torch 2.8 traces no slice of a NamedTuple
    return (base, lora_A, lora_B, dropout) if magnitude is None else (base, lora_A, lora_B, dropout, magnitude)


def dropout_p(dropout: nn.Module) -> float:
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def tensors_of(parts: Parts) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(W, c, A, B, b, m) as the modules hold them: a 4-bit W packed, Conv1D's transposed; b is PEFT's lora_bias, m DoRA's."""
    base, lora_A, lora_B, _, _, magnitude = parts
    m = None if magnitude is None else magnitude.weight
    return held(base, "weight"), held(base, "bias"), held(lora_A, "weight"), held(lora_B, "weight"), held(lora_B, "bias"), m


def held(module: Any, name: str) -> Any:
    """module.name, in most cases a parameter, which nn.Module's look-up takes a µs for; FSDP1 makes it a plain attribute."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)
