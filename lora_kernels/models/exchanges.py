"""What an adapter trains beside LoRA layers, modules_to_save and biases: copies that are exchanged for the originals.

A copy is in the original's place while its adapter is active, so that without one the model is the base model exactly, and
names never change.
"""

import copy
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..layers.adapters import AdaptedWeight
from ..layers.offload import offloaded_tensors
from .config import LoRAConfig
from .names import parents
from .wrappers import named_parameters, put, submodule, unwrapped


@dataclass
class Exchange:
    """A module or a parameter that adapters train in a copy: `choices[None]` is the original."""

    path: str  # of the owner
    attribute: str
    choices: dict[str | None, nn.Module | nn.Parameter]
    active: str | None = None  # whose choice is in place

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}".removeprefix(".")

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if what is in place is none of the choices, or choices differ in shape: it was replaced or resized
        after add_lora, and one of the two would be trained, the other saved.

        A parameter of the same shape is taken into the choices: fully_shard, to_empty and load_state_dict(assign=True) give
        modules new ones.
        """
        present, original = getattr(submodule(model, self.path), self.attribute, None), self.choices[None]
        if isinstance(present, nn.Module):
            present = unwrapped(present)
        known = any(present is choice for choice in self.choices.values())
        if isinstance(original, nn.Parameter):
            if known or (isinstance(present, Tensor) and not isinstance(present, nn.Parameter)):  # FSDP1's view of it
                return
            if isinstance(present, nn.Parameter) and present.shape == original.shape:
                self.choices[self.active] = present
                return
        elif known and all(_shapes(choice) == _shapes(original) for choice in self.choices.values()):
            return
        raise ValueError(
            f"{self.name}: got a {type(present).__name__} of {_shapes(present)}, expected what add_lora put there, of "
            f"{_shapes(original)}: it was replaced or resized since, and would not be trained or not be saved; make the model "
            "anew, and call resize_token_embeddings, or put another module there, before add_lora"
        )

    @property
    def adapters(self) -> list[str]:
        """Those that train a copy."""
        return [adapter for adapter in self.choices if adapter is not None]

    def activate(self, model: nn.Module, adapter: str | None) -> None:
        """Put the copy of `adapter`, or else the original, in its place."""
        owner = submodule(model, self.path)
        present, chosen = getattr(owner, self.attribute), self.choices.get(adapter, self.choices[None])
        for aside, here in zip(_tensors(chosen), _tensors(present), strict=True):
            aside.data = aside.data.to(here)  # what was put aside has missed model.to(…)
        put(owner, self.attribute, chosen)
        self.active = adapter if adapter in self.choices else None


def plan_exchanges(
    model: nn.Module, config: LoRAConfig, saved: dict[str, nn.Module], adapted: set[str]
) -> dict[tuple[str, str], nn.Module | nn.Parameter]:
    """What else the adapter trains, by (path of the owner, attribute): modules_to_save and biases.

    Raises ValueError for one that accelerate offloads, or that has no shape yet.
    """
    originals: dict[tuple[str, str], nn.Module | nn.Parameter] = {}
    for path, module in saved.items():
        owner, _, attribute = path.rpartition(".")
        originals[owner, attribute] = module
    if config.bias != "none":
        layers = [module for module in model.modules() if isinstance(module, AdaptedWeight)]
        adapters = {id(parameter) for layer in layers for parameter in layer.adapter_parameters()}
        for path, parameter in named_parameters(model):
            owner, _, attribute = path.rpartition(".")
            if id(parameter) in adapters:  # one may be named "bias"
                continue
            inside = any(parent in saved for parent in parents(owner))
            if attribute.endswith("bias") and not inside and (config.bias == "all" or owner in adapted):
                originals[owner, attribute] = parameter
    for (owner, attribute), original in originals.items():
        if any(map(is_lazy, _tensors(original))):
            field = "modules_to_save" if isinstance(original, nn.Module) else "bias"
            raise ValueError(
                f"{field}: got {f'{owner}.{attribute}'.removeprefix('.')}, a lazy module's, which has no shape yet and cannot "
                "be copied; call the model once before add_lora"
            )
    refuse_offloaded(model, originals)
    return originals


def refuse_offloaded(model: nn.Module, originals: dict[tuple[str, str], nn.Module | nn.Parameter]) -> None:
    """Raise ValueError for an original that accelerate offloads: its hook would load it in place of the adapter's copy."""
    offloaded = {id(kept.tensor): name for name, kept in offloaded_tensors(model).items()}
    for (owner, attribute), original in originals.items():
        if name := next((offloaded[id(tensor)] for tensor in _tensors(original) if id(tensor) in offloaded), None):
            raise ValueError(
                f"{f'{owner}.{attribute}'.removeprefix('.')}: the adapter has its own, but accelerate offloads {name}; "
                "give it a device of its own in device_map"
            )


def add_exchanges(exchanges: list[Exchange], adapter: str, originals: dict[tuple[str, str], nn.Module | nn.Parameter]) -> None:
    """Give `adapter` a trainable copy of each of plan_exchanges' originals."""
    present = {(exchange.path, exchange.attribute): exchange for exchange in exchanges}
    for (owner, attribute), original in originals.items():
        exchange = present.get((owner, attribute))
        if exchange is None:
            exchange = Exchange(owner, attribute, {None: original})
            exchanges.append(exchange)
        trained = copy.deepcopy(exchange.choices[None])
        trained.requires_grad_(True)
        exchange.choices[adapter] = trained


def _shapes(value: object) -> list[tuple[int, ...]]:
    """Of its parameters; buffers may grow in one and not in another."""
    found = value.parameters() if isinstance(value, nn.Module) else [value] if isinstance(value, Tensor) else []
    return [tuple(tensor.shape) for tensor in found]


def _tensors(value: nn.Module | nn.Parameter) -> list[Tensor]:
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]
