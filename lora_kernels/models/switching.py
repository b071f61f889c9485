"""Which adapter of a model is active."""

from torch import nn

from .state import adapted_layers, lora_layers, lora_state, refuse_if_merged


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make adapter `name` active in every layer that has it, and none in the others; None gives the base model.

    Raises KeyError for a name that no layer has, RuntimeError while merged.
    """
    layers = adapted_layers(model)
    known = {adapter for layer in layers.values() for adapter in layer.adapters}
    if name is not None and name not in known:
        raise KeyError(f"adapter {name!r}: not found; adapters here: {sorted(known)}")
    refuse_if_merged(layers, "change the active adapter")
    for layer in layers.values():
        layer.set_adapter(name if name in layer.adapters else None)
        if name is not None and name not in layer.adapters:
            for parameter in layer.adapter_parameters():
                parameter.requires_grad_(False)
    for exchange in lora_state(model).exchanges:
        exchange.activate(model, name)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, if there is one."""
    names = (layer.active_adapter for layer in lora_layers(model).values())
    return next((name for name in names if name is not None), None)
