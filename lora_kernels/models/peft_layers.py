"""PEFT's own layers in a model, which are not to be adapted again; PEFT is never imported for it."""

import sys

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
