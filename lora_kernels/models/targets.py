"""Which modules of a model a LoRAConfig means, why others are left out, and whether the adapters fit; changes nothing."""

import contextlib
import difflib
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..dtypes import FLOATS
from ..layers.adapters import AdaptedWeight
from ..layers.frozen_weight import is_conv1d, is_linear4bit
from ..layers.initialization import check_init
from ..layers.kinds import features, is_other, why_not_other
from ..layers.linear import LoRALinear, why_not_hooked
from ..layers.lora_experts import LoRAStack, Planned
from ..layers.offload import loaded_with_another
from .adalora.config import AdaLoRAConfig
from .config import ALL_LINEAR, LoRAConfig
from .expert_targets import plan_stacks
from .fused import UNCALLED, fused_weights, in_attention, why_fused
from .names import end_of, layer_index, names_match, numbered, parents, trained_whole
from .peft_layers import refuse_peft_layers
from .state import lora_layers, lora_state, refuse_offloaded_adapters
from .wrappers import named_modules, unwrapped

HEAD_NAMES = ("lm_head", "score", "classifier")  # output heads of models that do not name theirs


class Plan(NamedTuple):
    """The modules, and stacks of experts, to adapt by path, and why other candidates are not."""

    modules: dict[str, nn.Module | Planned]
    skipped: dict[str, str]


def plan_layers(model: nn.Module, config: LoRAConfig, adapter_name: str) -> Plan:
    """Raises ValueError if nothing can be adapted, RuntimeError if accelerate offloads earlier adapters."""
    refuse_peft_layers(model)
    refuse_offloaded_adapters(model, "add an adapter")
    model = unwrapped(model)
    if isinstance(model, (nn.Linear, nn.Conv2d, nn.Embedding, AdaptedWeight)):
        raise ValueError(f"model: got a single {type(model).__name__}, which cannot be exchanged in place; use from_linear")
    plan: dict[str, nn.Module | Planned] = {}
    skipped: dict[str, str] = {}
    heads = _output_heads(model) if config.target_modules == ALL_LINEAR else set()
    unreachable = loaded_with_another(model)
    adapted = lora_layers(model)
    modules = dict(named_modules(model))
    for path, module in modules.items():
        if any(parent in adapted for parent in parents(path)[1:]):
            continue
        if not _wanted(path, module, config):
            continue
        if id(module) in heads:
            reason: str | None = 'the output head, which "all-linear" leaves out'
        elif names_match(path, config.exclude_modules):
            reason = "exclude_modules names it"
        elif any(trained_whole(parent, config.modules_to_save) for parent in parents(path)):
            reason = "modules_to_save trains it whole"
        elif module in unreachable:
            reason = "accelerate's hook of a module around it loads its weight: leave that out of preload_module_classes"
        else:
            reason = UNCALLED if in_attention(path, modules) else _why_unsuitable(module, config)
        if reason is None:
            plan[path] = module
        else:
            skipped[path] = reason
    stacks, others = plan_stacks(modules, config)
    plan, skipped = plan | stacks, skipped | others
    for layer in adapted.values():
        if adapter_name in layer.adapters:
            raise ValueError(f"adapter_name: got {adapter_name!r}, which is in use; choose another or remove_lora(model) first")
    if not plan:
        raise ValueError(_nothing_matches(model, config, skipped))
    whole = {e.name: e for e in lora_state(model).exchanges if isinstance(e.choices[None], nn.Module)}
    for path in plan:
        if outer := next((whole[parent] for parent in parents(path) if parent in whole), None):
            raise ValueError(
                f"target_modules: got {path}, but {outer.name} is trained whole by {outer.adapters}, in copies, and "
                "a LoRA layer would be in one of them; name it in exclude_modules or modules_to_save, or delete those first"
            )
    for path, rank in config.ranks(plan).items():
        check_init(config.init_lora_weights, rank.r, *features(plan[path]))
    return Plan(plan, skipped)


def adapter_dtype(module: nn.Module | Planned, autocast_adapter_dtype: bool) -> torch.dtype:
    """What an adapter over a planned layer is held as: over 16 bits float32, or else the weight's own dtype."""
    quantized: Any = getattr(module.weight, "quant_state", None) if is_linear4bit(module) else None  # type: ignore[arg-type]
    dtype: Any = module.base_dtype if isinstance(module, AdaptedWeight) else (quantized or module.weight).dtype
    wide = autocast_adapter_dtype and dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if wide else dtype


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses, transformers' Conv1D and LoRALinear."""
    return isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)


def _wanted(path: str, module: nn.Module, config: LoRAConfig) -> bool:
    """Whether target_modules means a module, or weights that it has in place of linear layers."""
    fused = {} if isinstance(module, LoRAStack) else fused_weights(module)
    if config.target_modules == ALL_LINEAR:
        return is_linear(module) or bool(fused)
    return path != "" and (config.targets(path) or any(config.targets(f"{path}.{name}") for name in fused))


def _why_unsuitable(module: nn.Module, config: LoRAConfig) -> str | None:
    if is_other(module):
        own = {"dora": config.use_dora, "adalora": isinstance(config, AdaLoRAConfig), "lora_bias": config.lora_bias}
        return why_not_other(module, init=config.init_lora_weights, **own)
    if isinstance(module, LoRALinear):
        return None
    if (reason := why_fused(module)) is not None:
        return reason
    if isinstance(module, nn.Linear) and any(map(is_lazy, module.parameters())):
        return f"a {type(module).__name__}, which has no shape yet: call the model once before add_lora"
    if type(module) is not nn.Linear and not is_conv1d(module) and not is_linear4bit(module):
        return f"a {type(module).__name__}, not an nn.Linear or Conv1D: its forward may differ"
    if (reason := why_not_hooked(module)) is not None:
        return reason
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is not a parameter (computed by a hook?)"
    if is_linear4bit(module):
        quantized = getattr(module.weight, "quant_state", None) is not None
        return None if quantized else "a Linear4bit that is not quantised yet, which moving it to a device does"
    if module.weight.dtype not in FLOATS:
        return f"its weight has dtype {module.weight.dtype}"
    return None


def _output_heads(model: nn.Module) -> set[int]:
    """ids of the modules that "all-linear" leaves out."""
    heads = [module for name, module in model.named_children() if name in HEAD_NAMES]
    with contextlib.suppress(AttributeError, NotImplementedError):
        heads.append(model.get_output_embeddings())  # type: ignore[operator]
    return {id(unwrapped(head)) for head in heads if head is not None}


def _nothing_matches(model: nn.Module, config: LoRAConfig, skipped: dict[str, str]) -> str:
    linear = [path for path, module in named_modules(model) if is_linear(module)]
    meant = [path for path in linear if config.target_modules != ALL_LINEAR and names_match(path, config.target_modules)]
    if meant and not skipped:  # then layers_to_transform leaves them out
        return _no_such_layers(model, config, meant)
    leaves = sorted({path.split(".")[-1] for path in linear})
    names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    near = [match for name in names for match in difflib.get_close_matches(name.split(".")[-1], leaves, cutoff=0.5)]
    message = f"target_modules: {config.target_modules!r} matches no linear layer of {type(model).__name__}"
    if skipped:
        message += "; skipped: " + "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
    return message + f"; near names: {near}; linear layers here: {leaves[:20]}"


def _no_such_layers(model: nn.Module, config: LoRAConfig, meant: list[str]) -> str:
    numbers = sorted({number for path in meant if (number := layer_index(path, config.layers_pattern)) is not None})
    names = f"target_modules {config.target_modules!r} of {type(model).__name__}"
    if numbers:
        wanted = f"layers_to_transform: {config.layers_to_transform!r} matches no linear layer that has the names in"
        return f"{wanted} {names}; layer numbers there: {numbers}"
    if config.layers_pattern:
        wanted = f"layers_pattern: {config.layers_pattern!r} stands before no number in the paths of the names in {names}"
        return f"{wanted}, such as {meant[0]!r}; expected {sorted({end_of(path) for path in numbered(meant)})}"
    wanted = f"layers_to_transform: got {config.layers_to_transform!r}, but no number stands behind two names in the paths of"
    return f"{wanted} {names}, such as {meant[0]!r}; set layers_pattern to the name before the number, or leave both out"


def plan_modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to train whole by path, outermost ones only.

    Raises ValueError for one that holds another adapter's LoRA layer, or a part of what another one trains whole.
    """
    found = {path: module for path, module in named_modules(model) if path and trained_whole(path, config.modules_to_save)}
    saved = {path: module for path, module in found.items() if not any(parent in found for parent in parents(path)[1:])}
    taken = {path: list(layer.adapters) for path, layer in lora_layers(model).items()}
    for exchange in lora_state(model).exchanges:
        if exchange.name not in saved:  # the same in all adapters is each one's own copy
            taken[exchange.name] = exchange.adapters
    for path in saved:
        if clash := next((other for other in taken if path in parents(other) or other in parents(path)), None):
            raise ValueError(
                f"modules_to_save: got {path}, but {clash} is trained by {taken[clash]}, and one copy cannot hold both; "
                "leave it out, or delete those adapters first"
            )
    return saved
