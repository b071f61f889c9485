"""Which adapters a model has, and which of them is active."""

import warnings

from torch import nn

from ..layers.adapters import AdaptedWeight
from .state import adapted_layers, lora_exchanges, lora_layers, lora_state, refuse_if_merged, refuse_in_fsdp1


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make adapter `name` active in every layer that has it, and none in the others; None gives the base model.

    Raises KeyError for a name that no layer has, RuntimeError while merged, ValueError for a module in modules_to_save that was
    replaced or resized after add_lora. Warns where parameters become trainable inside DistributedDataParallel.
    """
    layers = adapted_layers(model) if name is None else _layers_with(model, name)
    refuse_if_merged(layers, "change the active adapter")
    exchanges = lora_exchanges(model)
    frozen = [p for layer in layers.values() for p in layer.adapter_parameters() if not p.requires_grad]
    for layer in layers.values():
        layer.set_adapter(name if name in layer.adapters else None)
        if name is not None and name not in layer.adapters:
            for parameter in layer.adapter_parameters():
                parameter.requires_grad_(False)
    exchanged: list[nn.Parameter] = []
    for exchange in exchanges:
        exchange.activate(model, name)
        copy = exchange.choices[name if name in exchange.choices else None]
        exchanged += copy.parameters() if isinstance(copy, nn.Module) else [copy]
    parallel = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    registered = {id(p) for module in parallel for p in module._module_parameters}  # a copy set aside then is not among them
    if parallel and any(p.requires_grad for p in [*frozen, *(p for p in exchanged if id(p) not in registered)]):
        warnings.warn(
            f"adapter {name!r} was frozen or set aside until now: if it was so when DistributedDataParallel was made, "
            "or was added later, its gradients are not synchronised; wrap the model again, after set_adapter",
            stacklevel=2,
        )


def active_adapter(model: nn.Module) -> str | None:
    """The name of the active adapter, if there is one."""
    names = (layer.active_adapter for layer in lora_layers(model).values())
    return next((name for name in names if name is not None), None)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove adapter `name`: its A, B and own biases, its copies of modules and biases, its config. If it was active, none is.

    The layers stay, for other adapters and later ones; `remove_lora` gives the plain model. Raises KeyError for a name that
    no layer has, RuntimeError while merged.
    """
    refuse_in_fsdp1(model, "delete an adapter")
    layers, state = _layers_with(model, name), lora_state(model)
    refuse_if_merged(layers, "delete an adapter")
    lora_exchanges(model)  # checks them
    if active_adapter(model) == name:
        set_adapter(model, None)
    for layer in layers.values():
        if name in layer.adapters:
            layer.delete_adapter(name)
    for exchange in state.exchanges:
        exchange.choices.pop(name, None)
    state.exchanges[:] = [exchange for exchange in state.exchanges if len(exchange.choices) > 1]
    state.configs.pop(name, None)
    state.allocations.pop(name, None)


def _layers_with(model: nn.Module, name: str) -> dict[str, AdaptedWeight]:
    """Every layer with adapters of the model. Raises KeyError if none has adapter `name`."""
    layers = adapted_layers(model)
    known = {adapter for layer in layers.values() for adapter in layer.adapters}
    if name not in known:
        raise KeyError(f"adapter {name!r}: not found; adapters here: {sorted(known)}")
    return layers
