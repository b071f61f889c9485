"""PEFT's own layers in a model, which are not to be adapted again; PEFT is never imported for it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .wrappers import named_modules, unwrapped


def peft_layers(model: nn.Module) -> list[str]:
    """Paths of the layers that PEFT has put into a model, and of the model itself where it is a PeftModel."""
    if "peft" not in sys.modules:
        return []
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [path for path, module in named_modules(model) if isinstance(module, (PeftModel, BaseTunerLayer))]


def refuse_peft_layers(model: nn.Module) -> None:
    """Raise ValueError if PEFT has layers in the model: their lora_A and lora_B would be taken for linear layers."""
    if not (found := peft_layers(model)):
        return
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    modules = dict(named_modules(model))
    outer = [module for module in modules.values() if isinstance(module, PeftModel)]
    cures = ["call accelerate(model) to let these compute with our kernels"] * any(
        isinstance(modules[path], LoraLayer) for path in found
    )
    if not outer:  # inject_adapter_in_model's, or transformers' add_adapter's: PEFT can only empty these layers
        cures.append("load the model anew for add_lora")
    elif hasattr(outer[0].base_model, "unload"):
        cures.append("give PEFT's model.unload() to add_lora")
    else:  # prompts beside a model that is as it was
        cures.append("give PEFT's model.get_base_model() to add_lora")
    own = f"layers, such as {found[-1]!r}" if found[-1] else "prompts"
    raise ValueError(
        f"model: got a {type(unwrapped(model)).__name__} with PEFT's own {own}, expected a model without; "
        + ", or ".join(cures)
    )


@contextlib.contextmanager
def mixed_peft_layers(model: nn.Module, names: tuple[str | None, ...], wanted: tuple[str, ...]) -> Iterator[None]:
    """Calls of PEFT's LoRA layers get `adapter_names`, as PEFT's own hooks give them in evaluation alone."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    modules = [module for _, module in named_modules(model)]
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    known = {name for layer in layers for name in layer.lora_A}
    if unknown := [name for name in wanted if name not in known]:
        raise KeyError(f"adapter {unknown[0]!r}: not found; adapters here: {sorted(known)}")
    named = ["__base__" if name is None else name for name in names]
    for layer in layers:
        for name in wanted if layer.training and torch.is_grad_enabled() else ():
            for part in (kind[name] for kind in (layer.lora_A, layer.lora_B) if name in kind):
                for parameter in part.parameters():
                    parameter.requires_grad_(True)
    hooked = [module for module in modules if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))]
    handles = [module.register_forward_pre_hook(_with_names(named), with_kwargs=True) for module in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_names(names: list[str]) -> Callable[..., tuple[Any, dict[str, Any]]]:
    return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})
