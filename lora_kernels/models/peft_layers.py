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
    if found := peft_layers(model):
        raise ValueError(
            f"model: got a {type(unwrapped(model)).__name__} with PEFT's own layers, such as {found[-1]!r}, expected a model "
            "without; call accelerate(model) to let these compute with our kernels, or PEFT's model.unload() before add_lora"
        )
