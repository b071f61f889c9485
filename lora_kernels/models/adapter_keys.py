"""PEFT's keys for the tensors of an adapter, of one that is there and of one that add_lora would make."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.kinds import adapter_shapes, is_embedding
from ..layers.lora_experts import Planned, peft_places
from .adalora.config import AdaLoRAConfig
from .config import LoRAConfig
from .exchanges import plan_exchanges
from .state import adapted_layers, lora_exchanges, lora_layers
from .targets import adapter_dtype, plan_modules_to_save
from .wrappers import named_buffers, named_parameters, plain_state_dict

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
KEYS = {  # ours -> PEFT's
    **{"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    **{"lora_bias": "lora_B.bias", "lora_magnitude": MAGNITUDE},
}
ADALORA_KEYS = {kind: kind for kind in ("lora_A", "lora_B", "lora_E")}
EMBEDDING_KEYS = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


def keys_of(module: nn.Module | Planned, adalora: bool) -> dict[str, str]:
    """The keys of an adapter's tensors behind the path of its layer, plain or adapted."""
    return EMBEDDING_KEYS if is_embedding(module) else ADALORA_KEYS if adalora else KEYS


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's keys; a trained bias of an adapted layer is its base layer's."""
    layers = adapted_layers(model)
    places = peft_places({path: layer for path, layer in layers.items() if adapter_name in layer.adapters})
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if adapter_name in layer.adapters:
            keys = keys_of(layer, layer.adapters[adapter_name].use_adalora)
            named, place = {kind: getattr(layer, kind) for kind in keys}, places[path]
            tensors.update(
                {f"{PREFIX}{place}.{keys[kind]}": own[adapter_name] for kind, own in named.items() if adapter_name in own}
            )
    exchanges = [exchange for exchange in lora_exchanges(model) if adapter_name in exchange.choices]
    own = [path for path, layer in layers.items() if adapter_name in layer.adapters]  # to a reader others' layers are plain
    return tensors | exchanged_tensors({(e.path, e.attribute): e.choices[adapter_name] for e in exchanges}, own)


def exchanged_tensors(
    originals: Mapping[tuple[str, str], nn.Module | nn.Parameter], adapted: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors of modules and parameters that are trained whole, given by (path of the owner, attribute), under PEFT's keys.

    adapted: paths of the layers with LoRA of that adapter, a bias of which PEFT has one level further down.
    """
    tensors: dict[str, Tensor] = {}
    for (owner, attribute), choice in originals.items():
        path = f"{owner}.{attribute}".removeprefix(".")
        if isinstance(choice, nn.Module):
            own = plain_state_dict(choice, keep_vars=True)
            tensors.update({f"{PREFIX}{path}.{key}": tensor for key, tensor in own.items()})
        else:
            tensors[f"{PREFIX}{owner}.base_layer.{attribute}" if owner in adapted else f"{PREFIX}{path}"] = choice
    return tensors


class Form(NamedTuple):
    """What is known of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def forms(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """The form of each tensor."""
    return {key: Form(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}


def planned_forms(
    model: nn.Module, config: LoRAConfig, plan: Mapping[str, nn.Module | Planned], autocast_adapter_dtype: bool
) -> dict[str, Form]:
    """The tensors of the adapter that add_lora would make in the layers of `plan`; changes nothing."""
    planned: dict[str, Form] = {}
    ranks, places = config.ranks(plan), peft_places(plan)
    for path, module in plan.items():
        keys, dtype = keys_of(module, isinstance(config, AdaLoRAConfig)), adapter_dtype(module, autocast_adapter_dtype)
        A, B = adapter_shapes(module, r := ranks[path].r)
        out_features = B[0]
        shapes: dict[str, tuple[int, ...]] = {"lora_A": A, "lora_B": B, "lora_E": (r, 1)}
        shapes |= {"lora_bias": (out_features,)} if config.lora_bias else {}
        shapes |= {"lora_magnitude": (out_features,)} if config.use_dora else {}
        planned |= {f"{PREFIX}{places[path]}.{key}": Form(shapes[kind], dtype) for kind, key in keys.items() if kind in shapes}
    saved = plan_modules_to_save(model, config)
    own = exchanged_tensors(plan_exchanges(model, config, saved, set(plan)), plan)
    return planned | forms(own)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters and buffers, under the keys that PEFT would give them."""
    layers = lora_layers(model)
    adapters = {id(parameter) for layer in layers.values() for parameter in layer.adapter_parameters()}
    tensors = {}
    named = *named_parameters(model, remove_duplicate=False), *named_buffers(model, remove_duplicate=False)  # tied ones too
    for name, tensor in named:
        if id(tensor) in adapters:
            continue
        owner, _, attribute = name.rpartition(".")
        tensors[f"{PREFIX}{name}"] = tensor
        if owner in layers or attribute == "weight":
            tensors[f"{PREFIX}{owner}.base_layer.{attribute}"] = tensor
    return tensors
