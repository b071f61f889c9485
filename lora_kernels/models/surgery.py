"""Put LoRA into any model and take it out again, by module type and name pattern: layers are exchanged in place."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import is_lazy

from ..layers.adapters import DEFAULT_ADAPTER, AdaptedWeight, check_adapter_name
from ..layers.kinds import adapted, is_other, plain
from ..layers.linear import check_quantize
from ..layers.lora_experts import LoRAExperts, LoRAStack, Planned, to_experts
from .adalora.config import AdaLoRAConfig
from .adapter_config import from_config
from .blocks import unfuse_blocks
from .config import LoRAConfig
from .config_checks import check_parts
from .exchanges import add_exchanges, plan_exchanges
from .names import grouped
from .pretrained import give_back_saving, take_over_saving
from .quantization_config import kept_dense
from .state import LoRAState, adapted_layers, lora_exchanges, lora_layers, lora_state, refuse_if_merged, refuse_in_fsdp1
from .state_dict import check_state
from .switching import active_adapter, set_adapter
from .targets import Plan, adapter_dtype, plan_layers, plan_modules_to_save
from .tasks import with_head
from .wrappers import is_fsdp1, named_modules, named_parameters, put, submodule, unwrapped

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True)
class LoRAReport:
    """What add_lora did; str() is for people."""

    adapter: str
    adapted: dict[str, int]  # path -> r
    skipped: dict[str, str]  # path -> reason
    trainable: int
    total: int
    left_dense: dict[str, str] = field(default_factory=dict)  # adapted all the same; path -> reason why not quantised

    def __str__(self) -> str:
        ranks = sorted(set(self.adapted.values()))
        lines = [
            f"adapter {self.adapter!r}: {len(self.adapted)} LoRA layers, r = {', '.join(map(str, ranks))}; "
            f"{self.trainable:,} of {self.total:,} parameters are trainable ({self.trainable / max(self.total, 1):.2%})"
        ]
        lines += [f"  not adapted: {line}" for line in grouped(self.skipped)]
        return "\n".join(lines + [f"  not quantised: {line}" for line in grouped(self.left_dense)])


def add_lora(
    model: nn.Module,
    config: "LoRAConfig | peft.LoraConfig",
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    autocast_adapter_dtype: bool = True,
    quantize: str | None = None,
) -> LoRAReport:
    """Add adapter `adapter_name` to the layers and stacks of experts that `config` names, in place, and freeze the rest.

    Layers: exactly nn.Linear, transformers' Conv1D and bitsandbytes' Linear4bit, and, where target_modules names them,
    nn.Conv2d with groups = 1 and nn.Embedding; their bytes are shared. Whatever else matches is skipped with a reason. A layer
    that an earlier adapter wrapped gets another one; the first adapter is active, later ones wait for `set_adapter`. A module
    registered in several places is adapted once, for all of them; a weight tied to another module stays tied.
    Layers on the meta device get adapters there (fill them with `reset_lora_parameters` after loading).
    autocast_adapter_dtype: adapters over 16-bit weights are float32, as in PEFT; False gives them the weight's dtype.
    quantize: "nf4" puts the dense weights of layers and stacks into 4 bits (QLoRA); `remove_lora` then gives dequantised ones.
    What a transformers model lists in _keep_in_fp32_modules, as T5 its "wo", stays dense, and the report says so.

    config: a LoRAConfig, an AdaLoRAConfig, or a peft.LoraConfig or peft.AdaLoraConfig, whose fields mean the same
        (`adapter_config.from_config`).

    Warns, with near names, of a name, pattern or layer number of `config` that means nothing in this model.
    Raises TypeError for another kind of config, and ValueError, before anything changes, for a name in use, a field of which
    nothing matches, a target in what another adapter trains whole or the reverse, ranks an initialisation cannot start from, a
    merged model, one with PEFT's own layers, or one inside DistributedDataParallel or FSDP1, which would not synchronise the
    new parameters' gradients. RuntimeError where accelerate offloads adapters that are there.
    """
    own = with_head(model, from_config(config, model))
    plan = plan_layers(model, own, adapter_name)
    check_parts(model, own, plan)
    return add_adapter(model, own, adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype, quantize=quantize)


def add_adapter(
    model: nn.Module, config: LoRAConfig, adapter_name: str, plan: Plan, *, autocast_adapter_dtype: bool, quantize: str | None
) -> LoRAReport:
    """add_lora, with plan_layers' plan, for a config that may name what this model does not have, as that of a file does whose
    tensors are checked.
    """
    if any(isinstance(module, nn.parallel.DistributedDataParallel) or is_fsdp1(module) for module in model.modules()):
        raise ValueError(
            f"model: got a {type(model).__name__}, whose DistributedDataParallel or FullyShardedDataParallel would not "
            "synchronise the gradients of new parameters; call add_lora first, and wrap the model then"
        )
    model = unwrapped(model)
    state = lora_state(model)
    check_adapter_name(adapter_name, "adapter_name")
    check_quantize(quantize)
    refuse_if_merged(lora_layers(model), "add an adapter")
    lora_exchanges(model)  # checks them
    originals = plan_exchanges(model, config, plan_modules_to_save(model, config), set(plan.modules))
    if config.bias != "none" and state.configs:
        raise ValueError(
            f"bias: got {config.bias!r} for a second adapter, expected 'none'; adapters here: {list(state.configs)}"
        )
    trainable_before = {name for name, parameter in named_parameters(model) if parameter.requires_grad}
    choices = [choice for exchange in state.exchanges for choice in exchange.choices.values()]
    trained = [choice for choice in choices if isinstance(choice, nn.Parameter) and choice.requires_grad]
    left_dense = {} if quantize is None else _left_dense(model, plan)
    quantized = {} if quantize is None else {path: quantize for path in plan.modules if path not in left_dense}
    layers = _build_layers(plan.modules, config, adapter_name, autocast_adapter_dtype, quantized)
    for bias in trained:  # of another adapter, in a plain layer until now: LoRA layers are made with a frozen one
        bias.requires_grad_(True)
    first = state.state_check is None
    active = active_adapter(model) if state.configs else adapter_name
    _put_in_place(model, layers)
    for planned in plan.modules.values():
        if isinstance(planned, Planned):
            planned.put(layers[id(planned)])  # type: ignore[arg-type]
    if first:
        model._lora_state = state  # type: ignore[assignment]
        state.frozen = trainable_before
        state.state_check = model.register_load_state_dict_pre_hook(check_state)
        take_over_saving(model)
        _freeze_base(model)
    _disable_fast_paths(model, state)
    state.configs[adapter_name] = copy.deepcopy(config)  # the caller may change theirs for the next model
    add_exchanges(state.exchanges, adapter_name, originals)
    set_adapter(model, active)
    return _report(model, config, adapter_name, plan, left_dense)


def remove_lora(model: nn.Module) -> None:
    """Put the original layers back and make trainable again what add_lora froze.

    Unmerged, the model is as it was before add_lora. Merged, the plain layers keep the merged weights, and trained modules and
    biases stay: `merge_lora(model); remove_lora(model)` leaves an ordinary fine-tuned model.
    """
    refuse_in_fsdp1(model, "remove adapters")
    layers = adapted_layers(model)
    unfuse_blocks(model)
    model = unwrapped(model)
    state = lora_state(model)
    merged = any(layer.merged for layer in layers.values())
    if not merged:
        for exchange in lora_exchanges(model):
            exchange.activate(model, None)
    _put_in_place(model, {id(layer): plain(layer) for layer in layers.values() if not isinstance(layer, LoRAStack)})
    for module in model.modules():
        if isinstance(module, LoRAExperts):
            to_experts(module)
    for path, value in state.fast_paths.items():
        submodule(model, path).activation_relu_or_gelu = value  # type: ignore[assignment]
    for name, parameter in named_parameters(model):
        parameter.requires_grad = parameter.requires_grad or name in state.frozen
    if state.state_check is not None:
        state.state_check.remove()
    give_back_saving(model)
    if hasattr(model, "_lora_state"):
        del model._lora_state


def _build_layers(
    plan: Mapping[str, nn.Module | Planned],
    config: LoRAConfig,
    adapter_name: str,
    autocast_adapter_dtype: bool,
    quantize: dict[str, str],
) -> dict[int, AdaptedWeight]:
    """A layer with the adapter for each planned module or stack, by the id of what it replaces; on an error nothing is left
    behind.

    quantize: for the paths that it has.
    """
    layers: dict[int, AdaptedWeight] = {}
    flags = [(p, p.requires_grad) for module in plan.values() for p in module.parameters()]
    try:
        ranks = config.ranks(plan)
        for path, module in plan.items():
            layer = module if isinstance(module, AdaptedWeight) else adapted(module, quantize.get(path))
            layer.add_adapter(
                adapter_name,
                ranks[path].r,
                ranks[path].lora_alpha,
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                lora_bias=config.lora_bias,
                use_dora=config.use_dora,
                use_adalora=isinstance(config, AdaLoRAConfig),
                dtype=adapter_dtype(layer, autocast_adapter_dtype),
            )
            layers[id(module)] = layer
    except BaseException:
        for layer in layers.values():
            layer.delete_adapter(adapter_name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return layers


def _left_dense(model: nn.Module, plan: Plan) -> dict[str, str]:
    """What `quantize` leaves as it is, and why."""
    stacks = {path: module for path, module in plan.modules.items() if isinstance(module, (Planned, LoRAStack))}
    modules = {path: module for path, module in plan.modules.items() if path not in stacks}
    dense = {path: _why_dense(stack) for path, stack in stacks.items()}
    other = "no linear layer: only those have 4-bit weights here"
    left = {path: other for path, module in modules.items() if is_other(module)}  # type: ignore[arg-type]
    return kept_dense(model, modules) | left | {path: reason for path, reason in dense.items() if reason}  # type: ignore[arg-type]


def _why_dense(stack: Planned | LoRAStack) -> str | None:
    """Why a stack that is to be quantised is not."""
    if isinstance(stack, LoRAStack) or stack.is_bitsandbytes:
        return None  # it stays what it is
    reason = stack.why_not_quantized()
    return reason and f"a stack of experts: {reason}"


def _put_in_place(model: nn.Module, layers: Mapping[int, nn.Module]) -> None:
    """Put layers[id(module)] in the place of every module that has one, in all places of the module."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if layers.get(id(module), module) is not module:
            owner, _, attribute = path.rpartition(".")
            put(model.get_submodule(owner), attribute, layers[id(module)])


def _freeze_base(model: nn.Module) -> None:
    adapters = {id(parameter) for layer in lora_layers(model).values() for parameter in layer.adapter_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad = False  # a lazy module's has no requires_grad_()


def _disable_fast_paths(model: nn.Module, state: LoRAState) -> None:
    """nn.TransformerEncoderLayer in evaluation hands `linear1.weight` to a fused operator and would miss the adapter;
    PyTorch's own switch for that operator is a zero here.
    """
    for path, module in named_modules(model):
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, AdaptedWeight) for m in module.modules()):
            state.fast_paths.setdefault(path, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0


def _report(model: nn.Module, config: LoRAConfig, adapter: str, plan: Plan, left_dense: dict[str, str]) -> LoRAReport:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters() if not is_lazy(parameter)]
    packed = sum(layer.matrix.numel() - layer.weight.numel() for layer in lora_layers(model).values() if layer.quantized)
    trained, total = sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes) + packed
    adapted = {path: rank.r for path, rank in config.ranks(plan.modules).items()}
    return LoRAReport(adapter, adapted, plan.skipped, trained, total, left_dense)
