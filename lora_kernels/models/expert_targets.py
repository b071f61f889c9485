"""Which stacks of experts' weights a LoRAConfig's target_parameters mean, and why others are left out."""

import difflib
from collections.abc import Mapping

from torch import nn

from ..dtypes import FLOATS
from ..layers.experts import is_experts, weight_names
from ..layers.experts_4bit import quantized_stack, why_not_stacks
from ..layers.lora_experts import LoRAExperts, LoRAStack, Planned
from ..layers.offload import forward_is_replaced
from .config import LoRAConfig
from .names import names_match

Stacks = dict[str, nn.Module | Planned]


def plan_stacks(modules: Mapping[str, nn.Module], config: LoRAConfig) -> tuple[Stacks, dict[str, str]]:
    """(what is to be adapted by path, a reason for each other parameter that target_parameters mean).

    Raises ValueError, with near names, for a name that means no parameter of the model.
    """
    found: Stacks = {}
    skipped: dict[str, str] = {}
    names = config.target_parameters or []
    for path, module in modules.items() if names else ():
        if isinstance(module, LoRAStack) and names_match(path, names):
            found[path] = module
        for name in () if isinstance(module, LoRAStack) else _names(module):
            if names_match(full := f"{path}.{name}".removeprefix("."), names):
                if (reason := _why_not(module, name)) is None:
                    found[full] = Planned(module, name)
                else:
                    skipped[full] = reason
    lost = [name for name in names if not any(names_match(path, [name]) for path in (*found, *skipped))]
    if lost or (names and not found):
        raise ValueError(_nothing(modules, lost or names, skipped))
    return found, skipped


def _names(module: nn.Module) -> list[str]:
    """Its own parameters, those that bitsandbytes has quantised included."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if not is_experts(module):
        return own
    return own + [name for name in weight_names(module) if quantized_stack(module, name) is not None]


def _why_not(module: nn.Module, name: str) -> str | None:
    if not is_experts(module) or name not in weight_names(module):
        return (
            f"a parameter of {type(module).__name__}, no stack of an experts class as transformers' use_experts_implementation "
            "makes them: its forward may differ"
        )
    if forward_is_replaced(module):
        return "the experts' forward was replaced on the instance, as accelerate's hooks do"
    if (reason := why_not_stacks(module, weight_names(module))) is not None or quantized_stack(module, name) is not None:
        return reason
    dtype = getattr(module, name).dtype
    return None if dtype in FLOATS else f"a stack of {dtype}"


def _nothing(modules: Mapping[str, nn.Module], names: list[str], skipped: Mapping[str, str]) -> str:
    experts = {path: module for path, module in modules.items() if is_experts(module) or isinstance(module, LoRAExperts)}
    known = sorted({f"{path.rpartition('.')[2]}.{name}" for path, module in experts.items() for name in weight_names(module)})
    message = f"target_parameters: {names} match no stack of experts"
    if skipped:
        message += "; skipped: " + "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
    near = list(dict.fromkeys(match for name in names for match in difflib.get_close_matches(name, known, cutoff=0.5)))
    return message + f"; near names: {near}; stacks here: {known}"
