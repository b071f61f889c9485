"""The state of a model that add_lora changed: its LoRA layers, and LoRAState, what else was changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers.adapters import AdaptedWeight
from ..layers.offload import loaded_with_another, offloading_hooks
from .config import LoRAConfig
from .exchanges import Exchange
from .peft_layers import peft_layers
from .wrappers import is_fsdp1, named_modules, unwrapped


@dataclass
class LoRAState:
    """What add_lora changed in a model beyond its layers, kept on the model as `_lora_state`."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    # AdaLoRA's adapters whose ranks a RankAllocator decides, or that a file brought: once ranks are final, which triplets stay
    allocations: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    # adapter -> the strings of the header of the file it was read from, such as kohya's ss_*, to be written again
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)  # names of the parameters that add_lora froze
    fast_paths: dict[str, int] = field(default_factory=dict)  # see surgery.py
    state_check: RemovableHandle | None = None  # see state_dict.check_state


def lora_state(model: nn.Module) -> LoRAState:
    """The model's own, or an empty one that is not kept."""
    return getattr(unwrapped(model), "_lora_state", None) or LoRAState()


def lora_exchanges(model: nn.Module) -> list[Exchange]:
    """What adapters train beside LoRA layers. Raises ValueError if one was replaced or resized after add_lora."""
    exchanges = lora_state(model).exchanges
    for exchange in exchanges:
        exchange.check(model)
    return exchanges


def lora_layers(model: nn.Module) -> dict[str, AdaptedWeight]:
    """Every layer with adapters of the model by its path, once each."""
    return {path: module for path, module in named_modules(model) if isinstance(module, AdaptedWeight)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedWeight]:
    """lora_layers(model). Raises ValueError if there are none, or if FSDP1 holds them in flat shards."""
    layers = lora_layers(model)
    if not layers:
        name = type(unwrapped(model)).__name__
        if peft_layers(model):
            raise ValueError(f"model: {name} has PEFT's own layers, expected add_lora's; use PEFT's methods for them")
        raise ValueError(f"model: {name} has no LoRA layers; call add_lora first")
    for path, layer in layers.items():
        for name, adapter in layer.adapters.items():
            shape, whole = tuple(layer.lora_A[name].shape), layer.adapter_shapes(adapter.r)[0]
            if shape != whole:
                raise ValueError(
                    f"{path}.lora_A.{name}: got shape {shape}, expected {whole}: FullyShardedDataParallel holds a flat part of "
                    "it; call this inside FullyShardedDataParallel.summon_full_params(model), or use fully_shard (FSDP2)"
                )
    return layers


def refuse_if_merged(layers: Mapping[str, AdaptedWeight], action: str) -> None:
    """Raise RuntimeError if one of the layers is merged."""
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError(f"cannot {action}: the model is merged; call unmerge_lora(model) first")


def refuse_offloaded_adapters(model: nn.Module, action: str, *, on_their_own: bool = True) -> None:
    """Raise RuntimeError if accelerate offloads adapters, as it does for a model that is dispatched with them: what is put into
    them is lost at the next call, and a tensor that its hooks do not know of makes the call fail.

    on_their_own=False: only where the hook of a module around an adapter keeps it, and the layer's weight with it.
    """
    together = loaded_with_another(model)
    for path, layer in lora_layers(model).items():
        for named in layer.adapter_dicts():
            if named in together or (on_their_own and offloading_hooks(named)):
                raise RuntimeError(
                    f"cannot {action}: accelerate offloads the adapters of {path or 'the layer'}; remove its hooks first, with "
                    "accelerate.hooks.remove_hook_from_submodules(model), and dispatch a model before add_lora"
                )


def refuse_in_fsdp1(model: nn.Module, action: str) -> None:
    """Raise ValueError if FSDP1 holds a part of the model: it puts its own views in the place of parameters at each call."""
    if any(is_fsdp1(module) for module in model.modules()):
        raise ValueError(
            f"cannot {action} inside FullyShardedDataParallel, which would put its own parameters back; save_merged and "
            "save_adapter write from it (inside summon_full_params where it is sharded)"
        )
