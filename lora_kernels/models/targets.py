"""Which modules of a model a LoRAConfig means, why others are left out, and whether the adapters fit; changes nothing."""

import contextlib
import difflib

from torch import nn

from ..dtypes import FLOATS
from ..layers.frozen_weight import is_conv1d, is_linear4bit
from ..layers.initialization import check_init
from ..layers.linear import LoRALinear, why_not_hooked
from ..layers.offload import loaded_with_another
from .config import ALL_LINEAR, LoRAConfig
from .fused import UNCALLED, fused_weights, in_attention, why_fused
from .names import names_match, parents, trained_whole
from .peft_layers import refuse_peft_layers
from .state import lora_layers, refuse_offloaded_adapters
from .wrappers import named_modules, unwrapped

HEAD_NAMES = ("lm_head", "score", "classifier")  # output heads of models that do not name theirs


def plan_layers(model: nn.Module, config: LoRAConfig, adapter_name: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to adapt by path, and why other candidates are not. Raises ValueError if nothing can be adapted,
    RuntimeError if accelerate offloads earlier adapters.
    """
    refuse_peft_layers(model)
    refuse_offloaded_adapters(model, "add an adapter")
    model = unwrapped(model)
    if isinstance(model, (nn.Linear, LoRALinear)):
        raise ValueError(f"model: got a single {type(model).__name__}, which cannot be exchanged in place; use from_linear")
    plan: dict[str, nn.Module] = {}
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
            reason = UNCALLED if in_attention(path, modules) else _why_unsuitable(module)
        if reason is None:
            plan[path] = module
        else:
            skipped[path] = reason
    for layer in adapted.values():
        if adapter_name in layer.adapters:
            raise ValueError(f"adapter_name: got {adapter_name!r}, which is in use; choose another or remove_lora(model) first")
    if not plan:
        raise ValueError(_nothing_matches(model, config, skipped))
    for path, module in plan.items():
        in_features, out_features = features(module)
        check_init(config.init_lora_weights, config.rank_and_alpha(path)[0], in_features, out_features)
    return plan, skipped


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a planned layer."""
    if isinstance(module, (nn.Linear, LoRALinear)):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)  # type: ignore[union-attr, return-value, arg-type]  # Conv1D


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses, transformers' Conv1D and LoRALinear."""
    return isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)


def _wanted(path: str, module: nn.Module, config: LoRAConfig) -> bool:
    """Whether target_modules means a module, or weights that it has in place of linear layers."""
    fused = fused_weights(module)
    if config.target_modules == ALL_LINEAR:
        return is_linear(module) or bool(fused)
    return path != "" and (config.targets(path) or any(config.targets(f"{path}.{name}") for name in fused))


def _why_unsuitable(module: nn.Module) -> str | None:
    if isinstance(module, LoRALinear):
        return None
    if (reason := why_fused(module)) is not None:
        return reason
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
    leaves = sorted({path.split(".")[-1] for path, module in named_modules(model) if is_linear(module)})
    names = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    near = [match for name in names for match in difflib.get_close_matches(name.split(".")[-1], leaves, cutoff=0.5)]
    message = f"target_modules: {config.target_modules!r} matches no linear layer of {type(model).__name__}"
    if skipped:
        message += "; skipped: " + "; ".join(f"{path}: {reason}" for path, reason in list(skipped.items())[:3])
    return message + f"; near names: {near}; linear layers here: {leaves[:20]}"


def plan_modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules to train whole by path, outermost ones only."""
    found = {path: module for path, module in named_modules(model) if path and trained_whole(path, config.modules_to_save)}
    return {path: module for path, module in found.items() if not any(parent in found for parent in parents(path)[1:])}
