"""PEFT's keys for the tensors of an adapter, of one that is there and of one that add_lora would make."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from .config import LoRAConfig
from .exchanges import plan_exchanges
from .state import adapted_layers, lora_layers, lora_state
from .targets import features, plan_layers, plan_modules_to_save
from .wrappers import named_buffers, named_parameters, plain_state_dict

PREFIX = "base_model.model."


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's keys; a trained bias of an adapted layer is its base layer's."""
    layers = adapted_layers(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if adapter_name in layer.adapters:
            tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[adapter_name]
            tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[adapter_name]
            if adapter_name in layer.lora_bias:
                tensors[f"{PREFIX}{path}.lora_B.bias"] = layer.lora_bias[adapter_name]
    exchanges = [exchange for exchange in lora_state(model).exchanges if adapter_name in exchange.choices]
    own = [
        path for path, layer in layers.items() if adapter_name in layer.adapters
    ]  # others' are plain to a reader of the file
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


def planned_shapes(model: nn.Module, config: LoRAConfig, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapter that add_lora would make; changes nothing."""
    plan, _ = plan_layers(model, config, adapter_name)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in plan.items():
        r, (in_features, out_features) = config.rank_and_alpha(path)[0], features(module)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (r, in_features)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (out_features, r)
        if config.lora_bias:
            shapes[f"{PREFIX}{path}.lora_B.bias"] = (out_features,)
    saved = plan_modules_to_save(model, config)
    own = exchanged_tensors(plan_exchanges(model, config, saved, set(plan)), plan)
    return shapes | {key: tuple(tensor.shape) for key, tensor in own.items()}


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
