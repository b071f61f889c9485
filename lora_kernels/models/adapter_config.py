"""LoRAConfig to and from PEFT's adapter_config.json."""

import dataclasses
import json
import re
import sys
from collections import Counter
from typing import Any

from torch import nn

from ..layers.initialization import rewrites_weight
from ..layers.kinds import is_embedding
from ..layers.lora_experts import LoRAStack
from .adalora.config import AdaLoRAConfig
from .config import LoRAConfig
from .names import names_match, parents, trained_whole
from .regexes import why_slow
from .state import lora_layers
from .tasks import saved_task
from .wrappers import named_modules, unwrapped

SHARED = (  # fields of the same name and meaning
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "use_rslora", "lora_bias", "use_dora", "bias", "modules_to_save", "task_type"),
    "target_parameters",
)
# Fields that do not change what a saved adapter computes. fan_in_fan_out follows from the type of each layer; the *_config
# fields only shape the initial values.
WITHOUT_EFFECT = (
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
)
ADALORA = tuple({field.name for field in dataclasses.fields(AdaLoRAConfig)} - {f.name for f in dataclasses.fields(LoRAConfig)})
MAY_BE_NULL = {f.name for f in dataclasses.fields(AdaLoRAConfig) if f.default is None} | {"rank_pattern", "alpha_pattern"}
UNREAD_BY_ADALORA = ("r", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")  # its rank_pattern is adalora/files.py's
KEEPING_THE_WEIGHT = (True, False, None, "gaussian", "orthogonal", "eva")  # initialisations that leave the base weight alone


def parsed(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON object. Raises ValueError, naming `source`, for anything else, one that is too deep, and a name twice in it."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r} is there twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON, or cut off: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source}: got a {type(values).__name__}, expected an object")
    return values


def from_peft(values: dict[str, Any], model: nn.Module, source: str) -> LoRAConfig:
    """The LoRAConfig that means what PEFT's `values` mean for `model`.

    Raises ValueError, naming `source`, for another kind of adapter, an initialisation that rewrote the base weight, or a field
    that is set and has no counterpart here.
    """
    kind = values.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{source}: peft_type is {kind!r}, expected 'LORA' or 'ADALORA'")
    adalora = kind == "ADALORA"
    init = values.get("init_lora_weights", True)
    if init not in KEEPING_THE_WEIGHT and not adalora:  # there it is read as True or False
        raise ValueError(
            f"{source}: init_lora_weights is {init!r}, which rewrote the base weight or changes the layer, so this adapter "
            "does not fit the original model; save it in PEFT with path_initial_model_for_weight_conversion, or merged"
        )
    for name, value in values.items():
        if name not in (*SHARED, *WITHOUT_EFFECT, *(ADALORA if adalora else ())) and value:
            raise ValueError(f"{source}: {name} is {value!r}, which has no counterpart here; use PEFT for this adapter")
    names = [name for name in (*SHARED, *ADALORA) if name not in UNREAD_BY_ADALORA] if adalora else SHARED
    if values.get("target_modules") is None and not values.get("target_parameters"):
        raise ValueError(f"{source}: target_modules is missing, expected a list of names or a regex")
    shared = {name: values[name] for name in names if name in values and not (values[name] is None and name in MAY_BE_NULL)}
    try:
        config = AdaLoRAConfig(**shared) if adalora else LoRAConfig(**shared)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    _refuse_slow(config, source)
    # PEFT lists names that a model may not have: "classifier" and "score" by task
    paths = [path for path, _ in named_modules(model) if path]
    there = [name for name in config.modules_to_save or () if any(trained_whole(path, [name]) for path in paths)]
    return dataclasses.replace(config, modules_to_save=there or None)


def _refuse_slow(config: LoRAConfig, source: str) -> None:
    """Raise ValueError, naming `source`, for a regex that may take years: Python's re has no limit of time."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name) or ()
        if name.endswith("_modules") and not isinstance(value, str):
            continue  # names
        for regex in [value] if isinstance(value, str) else value:
            if (why := why_slow(regex)) is not None:
                raise ValueError(f"{source}: {name}: got {regex!r}, which may take years: {why}; list names")


def from_config(config: Any, model: nn.Module) -> LoRAConfig:
    """A LoRAConfig as it is, and a peft.LoraConfig as the one that means the same for `model`.

    Raises TypeError for any other object, and ValueError for a field that is set and has no counterpart here.
    """
    if isinstance(config, LoRAConfig):
        return config
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(config, peft.LoraConfig):
        cure = "; LoRAConfig(**config) makes one of it" * isinstance(config, dict)
        raise TypeError(f"config: got {type(config).__name__}, expected a LoRAConfig, or peft.LoraConfig{cure}")
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values["task_type"] = getattr(config.task_type, "value", config.task_type)  # an enumeration's member
    if values["target_modules"] is None and not values.get("target_parameters"):  # PEFT's default, by the type of model
        kind = config.peft_type.value
        defaults = getattr(peft.utils, f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING")
        values["target_modules"] = defaults.get(getattr(getattr(unwrapped(model), "config", None), "model_type", None))
    # A new adapter may begin in any way that add_lora knows, and what it is to train whole is checked with the other names.
    own = from_peft({**values, "init_lora_weights": True, "modules_to_save": None}, model, f"peft.{type(config).__name__}")
    init = bool(config.init_lora_weights) if isinstance(own, AdaLoRAConfig) else config.init_lora_weights
    return dataclasses.replace(own, init_lora_weights=init, modules_to_save=values["modules_to_save"] or None)


def to_peft(model: nn.Module, config: LoRAConfig, adapter_name: str) -> dict[str, Any]:
    """PEFT's fields for adapter `adapter_name`, which add_lora gave `model`.

    Raises ValueError for what PEFT's file cannot say: an initialisation that rewrote the base weight, or a layer whose rank or
    scaling is not what `config` says.
    """
    if rewrites_weight(config.init_lora_weights):
        raise ValueError(
            f"adapter {adapter_name!r}: its initialisation {config.init_lora_weights!r} rewrote the base weights, so its A and "
            "B do not fit the original model; call merge_lora(model), remove_lora(model), and save the model"
        )
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter_name in layer.adapters}
    linear = {path for path, layer in layers.items() if not isinstance(layer, LoRAStack)}
    ranks = config.ranks(layers)
    for path, layer in layers.items():
        adapter, (r, _, scaling) = layer.adapters[adapter_name], ranks[path]
        if adapter.r != r or abs(float(adapter.scaling) - scaling) > 1e-6 * abs(scaling):  # float32 where it is a tensor
            raise ValueError(
                f"{path}: adapter {adapter_name!r} has r={adapter.r} and scaling {float(adapter.scaling):g}, but its config "
                f"says {r} and {scaling:g}; PEFT's file stores r and lora_alpha only: set the scaling back, or merge"
            )
    if isinstance(config, AdaLoRAConfig) and config.total_step is None:
        raise ValueError(
            f"total_step: got None for adapter {adapter_name!r}, which PEFT's ADALORA file needs; give AdaLoRAConfig the "
            "number of training steps, or make it a plain LoRA by compact_ranks(model)"
        )
    return {
        "peft_type": "ADALORA" if isinstance(config, AdaLoRAConfig) else "LORA",
        **{name: getattr(config, name) for name in ADALORA if isinstance(config, AdaLoRAConfig)},
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "init_lora_weights": config.init_lora_weights,
        "fan_in_fan_out": any(layers[path].fan_in_fan_out for path in linear if not is_embedding(layers[path])),
        **{name: getattr(config, name) for name in SHARED},
        "target_modules": _target_modules(model, config, linear),
        "layers_to_transform": None,  # target_modules says it
        "layers_pattern": None,
        **saved_task(model, config),
    }


def _target_modules(model: nn.Module, config: LoRAConfig, adapted: set[str]) -> list[str] | str:
    """config's own target_modules if PEFT would adapt the same layers for it, otherwise names or a regex for exactly those.

    PEFT matches names of any module and refuses, or adapts, types that add_lora leaves alone. It adapts inside a module that
    modules_to_save means by the end of a word ("norm" in "input_norm"), where add_lora does not.
    """
    saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in config.modules_to_save or ()]
    candidates = [
        path
        for path, _ in named_modules(model)
        if path and not any(p in adapted for p in parents(path)[1:]) and not any(regex.match(path) for regex in saved)
    ]
    own = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    for names in (own, sorted({path.rpartition(".")[2] for path in adapted}), sorted(adapted)):
        matched = {p for p in candidates if names_match(p, names) and not names_match(p, config.exclude_modules)}
        if names != "all-linear" and matched == adapted:
            return names
    return "|".join(re.escape(path) for path in sorted(adapted))
