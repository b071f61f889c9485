"""mixed_adapters: a batch whose samples have different adapters."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..layers.adapters import AdaptedWeight
from ..layers.linear import LoRALinear
from ..layers.mixed import Mixed, why_not_mixed
from .peft_layers import mixed_peft_layers, peft_layers
from .state import adapted_layers, lora_exchanges, refuse_if_merged


@contextlib.contextmanager
def mixed_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Calls of `model` compute sample i of the batch with adapter names[i], or without one where that is None.

    names: one for each sample, along the first dimension of every adapted layer's x. Which adapter is active does not count;
    a layer without a sample's adapter computes its base. All rows are one product with the base (`multi_lora_linear`). A
    PeftModel is taken too, whose own `adapter_names=` is for evaluation alone: here it trains as well.
    In training mode the adapters that are named become trainable, as by `set_adapter`, and stay so: `lora_parameters(model)`
    has theirs then. With activation checkpointing backward() belongs inside, for it calls the layers again.
    Raises TypeError or KeyError for other or unknown names, RuntimeError while merged, ValueError for an adapter that has more
    than A and B (DoRA, a bias, modules_to_save, an initialisation that rewrote the weight), and at a call of other samples.
    """
    if isinstance(names, str) or not names or any(not isinstance(name, (str, type(None))) for name in names):
        raise TypeError(f"names: got {names!r}, expected a name, or None, for each sample")
    wanted = tuple(dict.fromkeys(name for name in names if name is not None))
    if peft_layers(model):
        with mixed_peft_layers(model, tuple(names), wanted):
            yield
        return
    layers = _linear_layers(adapted_layers(model), wanted)
    _check(model, layers, wanted)
    before = {path: layer.mixed for path, layer in layers.items()}
    for layer in layers.values():
        layer.mixed = Mixed(tuple(names), tuple(name for name in wanted if name in layer.adapters))
        if layer.training and torch.is_grad_enabled():
            for name in layer.mixed.adapters:
                layer.make_trainable(name)
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.mixed = before[path]


def _linear_layers(layers: Mapping[str, AdaptedWeight], wanted: tuple[str, ...]) -> dict[str, LoRALinear]:
    """Those that can compute each sample with another adapter. Raises ValueError if others would compute with one."""
    for path, layer in layers.items():
        own = [name for name in (*wanted, layer.active_adapter) if name in layer.adapters]
        if own and not isinstance(layer, LoRALinear):
            raise ValueError(
                f"adapter {own[0]!r}: got one with {path}, a {type(layer).__name__}, expected linear layers alone: no other "
                "kind has an adapter for each sample; use set_adapter"
            )
    return {path: layer for path, layer in layers.items() if isinstance(layer, LoRALinear)}


def _check(model: nn.Module, layers: dict[str, LoRALinear], wanted: tuple[str, ...]) -> None:
    known = {name for layer in layers.values() for name in layer.adapters}
    if unknown := [name for name in wanted if name not in known]:
        raise KeyError(f"adapter {unknown[0]!r}: not found; adapters here: {sorted(known)}")
    refuse_if_merged(adapted_layers(model), "mix adapters")
    for exchange in lora_exchanges(model):
        if own := [name for name in wanted if name in exchange.choices]:
            raise ValueError(
                f"adapter {own[0]!r}: got one with its own {exchange.name}, expected A and B alone: "
                "one batch cannot have several; use set_adapter"
            )
        if exchange.active is not None:
            raise ValueError(
                f"adapter {exchange.active!r}: got its own {exchange.name} in place, expected the base model's; "
                "call set_adapter(model, None) first"
            )
    for path, layer in layers.items():
        for name in wanted:
            if name in layer.adapters and (reason := why_not_mixed(layer, name)) is not None:
                raise ValueError(f"adapter {name!r}: got {reason} in {path}, expected A and B alone; use set_adapter")
