"""Put LoRA into any model, switch, merge and take it out again: by module type and name pattern.

`add_lora` exchanges linear layers for LoRALinear in place. What else an adapter trains, whole modules (`modules_to_save`) and
biases, is a copy that is put in the original's place while the adapter is active, so `set_adapter(model, None)` is the base
model exactly and names never change.
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers.linear import DEFAULT_ADAPTER, LoRALinear, check_quantize
from .config import LoRAConfig
from .targets import lora_layers, parents, plan_layers, plan_modules_to_save


@dataclass
class Exchange:
    """A module or a parameter that adapters train in a copy: `choices[None]` is the original."""

    path: str  # of the owner
    attribute: str
    choices: dict[str | None, nn.Module | nn.Parameter]

    def activate(self, model: nn.Module, adapter: str | None) -> None:
        owner = model.get_submodule(self.path)
        present, chosen = getattr(owner, self.attribute), self.choices.get(adapter, self.choices[None])
        for aside, here in zip(_tensors(chosen), _tensors(present), strict=True):
            aside.data = aside.data.to(here)  # what was put aside has missed model.to(…)
        setattr(owner, self.attribute, chosen)


@dataclass
class LoRAState:
    """What add_lora changed in a model beyond its linear layers, kept on the model as `_lora_state`."""

    configs: dict[str, LoRAConfig] = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)  # names of the parameters that add_lora froze
    fast_paths: dict[str, int] = field(default_factory=dict)  # see _disable_fast_paths
    state_check: RemovableHandle | None = None  # see _check_state


@dataclass(frozen=True)
class LoRAReport:
    """What add_lora did; str() is for people."""

    adapter: str
    adapted: dict[str, int]  # path -> r
    skipped: dict[str, str]  # path -> reason
    trainable: int
    total: int

    def __str__(self) -> str:
        ranks = sorted(set(self.adapted.values()))
        lines = [
            f"adapter {self.adapter!r}: {len(self.adapted)} LoRA layers, r = {', '.join(map(str, ranks))}; "
            f"{self.trainable:,} of {self.total:,} parameters are trainable ({self.trainable / max(self.total, 1):.2%})"
        ]
        return "\n".join(lines + [f"  not adapted: {path}: {reason}" for path, reason in self.skipped.items()])


def add_lora(
    model: nn.Module,
    config: LoRAConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    autocast_adapter_dtype: bool = True,
    quantize: str | None = None,
) -> LoRAReport:
    """Add adapter `adapter_name` to the linear layers of `model` that `config` names, in place, and freeze the rest.

    Layers: exactly nn.Linear, transformers' Conv1D and bitsandbytes' Linear4bit, whose bytes are shared; whatever else matches
    is skipped with a reason. A layer that an earlier adapter wrapped gets another one; the first adapter is active, later ones
    wait for `set_adapter`. A module registered in several places is adapted once, for all of them; a weight tied to another
    module stays tied. Layers on the meta device get adapters there (fill them with `reset_lora_parameters` after loading).
    autocast_adapter_dtype: adapters over 16-bit weights are float32, as in PEFT; False gives them the weight's dtype.
    quantize: "nf4" puts the layers' dense weights into 4 bits (QLoRA); `remove_lora` then gives dequantised ones.

    Raises ValueError, before anything changes, for a name in use, a pattern that matches no linear layer (with near names),
    modules_to_save that are not there, ranks an initialisation cannot start from, or a merged model.
    """
    state = _state(model)
    check_quantize(quantize)
    _refuse_if_merged(lora_layers(model), "add an adapter")
    plan, skipped = plan_layers(model, config, adapter_name)
    saved = plan_modules_to_save(model, config)
    if config.bias != "none" and state.configs:
        raise ValueError(
            f"bias: got {config.bias!r} for a second adapter, expected 'none'; adapters here: {list(state.configs)}"
        )
    trainable_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    layers = _build_layers(plan, config, adapter_name, autocast_adapter_dtype, quantize)
    first = not state.configs
    active = adapter_name if first else _active(model)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in layers and not isinstance(module, LoRALinear):
            _replace(model, path, layers[id(module)])
    if first:
        model._lora_state = state  # type: ignore[assignment]
        adapters = {id(parameter) for layer in lora_layers(model).values() for parameter in layer.adapter_parameters()}
        for parameter in model.parameters():
            if id(parameter) not in adapters:
                parameter.requires_grad_(False)
        state.frozen = trainable_before
        state.state_check = model.register_load_state_dict_pre_hook(_check_state)
    _disable_fast_paths(model, state)
    state.configs[adapter_name] = config
    _add_exchanges(model, state, config, adapter_name, saved, set(plan))
    set_adapter(model, active)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    ranks = {path: config.rank_and_alpha(path)[0] for path in plan}
    packed = sum(layer.matrix.numel() - layer.weight.numel() for layer in lora_layers(model).values() if layer.quantized)
    return LoRAReport(adapter_name, ranks, skipped, trained, sum(p.numel() for p in model.parameters()) + packed)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make adapter `name` active in every layer that has it, and none in the others; None gives the base model.

    Raises KeyError for a name that no layer has, RuntimeError while merged.
    """
    layers = _adapted_layers(model)
    known = {adapter for layer in layers.values() for adapter in layer.adapters}
    if name is not None and name not in known:
        raise KeyError(f"adapter {name!r}: not found; adapters here: {sorted(known)}")
    _refuse_if_merged(layers, "change the active adapter")
    for layer in layers.values():
        layer.set_adapter(name if name in layer.adapters else None)
        if name is not None and name not in layer.adapters:
            for parameter in layer.adapter_parameters():
                parameter.requires_grad_(False)
    for exchange in _state(model).exchanges:
        exchange.activate(model, name)


def merge_lora(model: nn.Module) -> dict[str, float]:
    """Merge the active adapter of every layer into its weight (`LoRALinear.merge`); all layers or, on an error, none.

    Returns the relative error of each layer whose 4-bit weight had to be quantised again, by path.
    """
    layers = _adapted_layers(model)
    _refuse_if_merged(layers, "merge again")
    active = {path: layer for path, layer in layers.items() if layer.active_adapter is not None}
    if not active:
        raise RuntimeError("cannot merge: no adapter is active; call set_adapter(model, name) first")
    try:
        errors = {path: layer.merge() for path, layer in active.items()}
    except BaseException:
        for layer in active.values():
            if layer.merged:
                layer.unmerge()
        raise
    return {path: error for path, error in errors.items() if error is not None}


def unmerge_lora(model: nn.Module) -> None:
    """Take the merged adapters out of the weights again, bit-exactly. Raises RuntimeError if nothing is merged."""
    merged = [layer for layer in _adapted_layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("cannot unmerge: no layer is merged")
    for layer in merged:
        layer.unmerge()


def remove_lora(model: nn.Module) -> None:
    """Put the original layers back and make trainable again what add_lora froze.

    Unmerged, the model is as it was before add_lora. Merged, the plain layers keep the merged weights, and trained modules and
    biases stay: `merge_lora(model); remove_lora(model)` leaves an ordinary fine-tuned model.
    """
    layers = _adapted_layers(model)
    state = _state(model)
    merged = any(layer.merged for layer in layers.values())
    if not merged:
        for exchange in state.exchanges:
            exchange.activate(model, None)
    plain = {id(layer): layer.to_linear() for layer in layers.values()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in plain:
            _replace(model, path, plain[id(module)])
    for path, value in state.fast_paths.items():
        model.get_submodule(path).activation_relu_or_gelu = value  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in state.frozen)
    if state.state_check is not None:
        state.state_check.remove()
    if hasattr(model, "_lora_state"):
        del model._lora_state


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training the active adapter changes: its A and B, trained biases and modules_to_save."""
    own: list[Tensor] = []
    for layer in _adapted_layers(model).values():
        own += layer.adapter_parameters()
    for exchange in _state(model).exchanges:
        for adapter, choice in exchange.choices.items():
            if adapter is not None:
                own += choice.parameters() if isinstance(choice, nn.Module) else [choice]
    ids = {id(parameter) for parameter in own}
    return [parameter for parameter in model.parameters() if id(parameter) in ids and parameter.requires_grad]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter's tensors, and nothing of the frozen base; detached, not copied.

    Keys: `<path>.lora_A.<adapter>`, `<path>.lora_B.<adapter>`, and `<path>.lora_bias.<adapter>` with lora_bias;
    `<path>.modules_to_save.<adapter>.<name>` for whole modules; `<path>.bias.<adapter>` for trained biases.
    """
    state = {}
    for path, layer in _adapted_layers(model).items():
        for name in layer.adapters:
            state[f"{path}.lora_A.{name}"] = layer.lora_A[name].detach()
            state[f"{path}.lora_B.{name}"] = layer.lora_B[name].detach()
            if name in layer.lora_bias:
                state[f"{path}.lora_bias.{name}"] = layer.lora_bias[name].detach()
    for exchange in _state(model).exchanges:
        owner = f"{exchange.path}.{exchange.attribute}".removeprefix(".")
        for adapter, choice in exchange.choices.items():
            if isinstance(choice, nn.Module) and adapter is not None:
                state.update({f"{owner}.modules_to_save.{adapter}.{key}": value for key, value in choice.state_dict().items()})
            elif isinstance(choice, nn.Parameter) and adapter is not None:
                state[f"{owner}.{adapter}"] = choice.detach()
    return state


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state`, as from `lora_state_dict`, into the adapters of `model`.

    Raises ValueError, before anything changes, if a key is missing or unknown or a shape differs.
    """
    own = lora_state_dict(model)
    _refuse_if_merged(lora_layers(model), "load an adapter")
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    problems = [f"missing {len(missing)}, such as {missing[:3]}"] * bool(missing)
    problems += [f"unknown {len(unknown)}, such as {unknown[:3]}"] * bool(unknown)
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key}: got shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    if problems:
        raise ValueError(
            "state does not fit this model's adapters: " + "; ".join(problems[:5]) + "; "
            "add_lora must have been called with the same config, adapter names and base model"
        )
    for key, value in own.items():
        value.copy_(state[key])


# ---- changing ----


def _build_layers(
    plan: dict[str, nn.Module], config: LoRAConfig, adapter_name: str, autocast_adapter_dtype: bool, quantize: str | None
) -> dict[int, LoRALinear]:
    """LoRALinear for each planned module, by the id of what it replaces; on an error nothing is left behind."""
    layers: dict[int, LoRALinear] = {}
    flags = [(p, p.requires_grad) for module in plan.values() for p in module.parameters()]
    try:
        for path, module in plan.items():
            layer = module if isinstance(module, LoRALinear) else LoRALinear.from_linear(module, r=None, quantize=quantize)
            wide = autocast_adapter_dtype and layer.base_dtype in (torch.bfloat16, torch.float16)
            r, lora_alpha = config.rank_and_alpha(path)
            layer.add_adapter(
                adapter_name,
                r,
                lora_alpha,
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                lora_bias=config.lora_bias,
                dtype=torch.float32 if wide else None,
            )
            layers[id(module)] = layer
    except BaseException:
        for layer in layers.values():
            layer.delete_adapter(adapter_name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return layers


def plan_exchanges(
    model: nn.Module, config: LoRAConfig, saved: dict[str, nn.Module], adapted: set[str]
) -> dict[tuple[str, str], nn.Module | nn.Parameter]:
    """What else the adapter trains, by (path of the owner, attribute): modules_to_save and biases."""
    originals: dict[tuple[str, str], nn.Module | nn.Parameter] = {}
    for path, module in saved.items():
        owner, _, attribute = path.rpartition(".")
        originals[owner, attribute] = module
    if config.bias != "none":
        for path, parameter in model.named_parameters():
            owner, _, attribute = path.rpartition(".")
            inside = any(parent in saved for parent in parents(owner))
            if attribute.endswith("bias") and not inside and (config.bias == "all" or owner in adapted):
                originals[owner, attribute] = parameter
    return originals


def _add_exchanges(
    model: nn.Module, state: LoRAState, config: LoRAConfig, adapter: str, saved: dict[str, nn.Module], adapted: set[str]
) -> None:
    originals = plan_exchanges(model, config, saved, adapted)
    for (owner, attribute), original in originals.items():
        exchange = next((e for e in state.exchanges if (e.path, e.attribute) == (owner, attribute)), None)
        if exchange is None:
            exchange = Exchange(owner, attribute, {None: original})
            state.exchanges.append(exchange)
        trained = copy.deepcopy(exchange.choices[None])
        trained.requires_grad_(True)
        exchange.choices[adapter] = trained


def _check_state(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before load_state_dict changes any layer: raise ValueError if the state's 4-bit weights do not fit."""
    for path, layer in lora_layers(model).items():
        layer.check_state(state_dict, f"{prefix}{path}.")


def _disable_fast_paths(model: nn.Module, state: LoRAState) -> None:
    """nn.TransformerEncoderLayer in evaluation hands `linear1.weight` to a fused operator and would miss the adapter;
    PyTorch's own switch for that operator is a zero here.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, LoRALinear) for m in module.modules()):
            state.fast_paths.setdefault(path, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


def _tensors(value: nn.Module | nn.Parameter) -> list[Tensor]:
    return [*value.parameters(), *value.buffers()] if isinstance(value, nn.Module) else [value]


def _state(model: nn.Module) -> LoRAState:
    return getattr(model, "_lora_state", None) or LoRAState()


def _adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no LoRA layers; call add_lora first")
    return layers


def _active(model: nn.Module) -> str | None:
    return next((layer.active_adapter for layer in lora_layers(model).values() if layer.active_adapter is not None), None)


def _refuse_if_merged(layers: dict[str, LoRALinear], action: str) -> None:
    if any(layer.merged for layer in layers.values()):
        raise RuntimeError(f"cannot {action}: the model is merged; call unmerge_lora(model) first")
