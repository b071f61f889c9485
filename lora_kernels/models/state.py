"""The state of a model that add_lora changed: its LoRA layers, and LoRAState, what else was changed."""

from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers.linear import LoRALinear
from .config import LoRAConfig
from .exchanges import Exchange


@dataclass
class LoRAState:
    """What add_lora changed in a model beyond its linear layers, kept on the model as `_lora_state`."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)  # names of the parameters that add_lora froze
    fast_paths: dict[str, int] = field(default_factory=dict)  # see surgery.py
    state_check: RemovableHandle | None = None  # see state_dict.check_state


def lora_state(model: nn.Module) -> LoRAState:
    """The model's own, or an empty one that is not kept."""
    return getattr(model, "_lora_state", None) or LoRAState()


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear of the model by its path, once each."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """lora_layers(model). Raises ValueError if there are none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRA layers; call add_lora first")
    return layers


def refuse_if_merged(layers: dict[str, LoRALinear], action: str) -> None:
    """Raise RuntimeError if one of the layers is merged."""
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError(f"cannot {action}: the model is merged; call unmerge_lora(model) first")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
