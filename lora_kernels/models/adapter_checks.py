"""Whether an adapter's file fits a model: its tensors and its settings, with everything that does not in one message."""

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..dtypes import FLOATS, dtype_name
from ..layers.frozen_weight import is_conv1d
from ..layers.kinds import is_other
from ..layers.linear import LoRALinear
from ..layers.offload import offloaded_tensors, with_values
from .adapter_keys import MAGNITUDE, PREFIX, Form, base_tensors
from .config import LoRAConfig
from .distributed import full
from .state import lora_layers
from .wrappers import named_modules

SHOWN = 4  # problems of a file that an error names


def check_tensors(model: nn.Module, saved: dict[str, Tensor], expected: dict[str, Form], source: Path) -> dict[str, Tensor]:
    """The tensors of `expected` from the file.

    Raises ValueError for anything missing, unknown, of another shape or dtype, trained to NaN or infinity, or too large to be
    held.
    """
    unprefixed = sorted(key for key in saved if not key.startswith(PREFIX))
    if unprefixed or not saved:
        raise ValueError(
            f"{source}: expected keys that begin with {PREFIX!r}, but {len(unprefixed)} of {len(saved)} do not: "
            f"{unprefixed[:3]}; save it with PEFT's save_pretrained"
        )
    base = base_tensors(model)
    problems = []
    missing = sorted(expected.keys() - saved.keys())
    if missing:
        dora = ", which DoRA has: use_dora is true" * missing[0].endswith(MAGNITUDE)
        problems.append(f"missing {len(missing)} of {len(expected)}, such as {missing[0]!r}{dora}")
    weights = (base.get(f"{key.partition('.lora_')[0]}.weight", base.get(key)) for key in expected)
    offloaded = {id(each.tensor) for each in offloaded_tensors(model).values()}  # adapters over these are elsewhere
    if any(weight is not None and weight.is_meta and id(weight) not in offloaded for weight in weights):
        problems.append("the model is on the meta device, where values are lost: load its weights first, then the adapter")
    value = with_values(model)
    base |= {key: value(base[key]) for key in saved.keys() - expected.keys() if key in base}
    problems += _unknown(model, saved, expected, base)
    for key in sorted(expected.keys() & saved.keys()):
        if tuple(saved[key].shape) != expected[key].shape:
            problems.append(f"{key!r} has shape {tuple(saved[key].shape)}, expected {expected[key].shape}")
        elif ".lora_" in key and saved[key].dtype not in FLOATS:
            problems.append(f"{key!r} has dtype {saved[key].dtype}, expected a floating-point one")
        elif key not in base or isinstance(base[key], nn.Parameter):
            problems += why_not_finite(key, saved[key], expected[key].dtype)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" * (len(problems) > SHOWN)
        raise ValueError(f"{source} does not fit this model, nothing was changed: " + "; ".join(problems[:SHOWN]) + more)
    return {key: saved[key] for key in expected}


def why_not_finite(key: str, tensor: Tensor, dtype: torch.dtype | None = None) -> list[str]:
    """[the error] for a trained tensor with NaN or infinity in it, which no model computes anything with; or [].

    dtype: as which it will be held; values that are infinite only there are an error as well.
    """
    if tensor.dtype not in FLOATS or tensor.is_meta:  # PyTorch cannot ask that of float8
        return []
    bad = int((~tensor.isfinite()).sum())
    if not bad and dtype in FLOATS and (lost := int((~tensor.to(dtype).isfinite()).sum())):
        largest = torch.finfo(dtype).max
        return [
            f"{key!r} has {lost} of {tensor.numel()} values beyond {largest:g}, {dtype_name(dtype)}'s largest: they would "
            "become infinite; hold the adapter in a wider dtype, or scale it down"
        ]
    return [f"{key!r} holds NaN or infinity in {bad} of {tensor.numel()} values: its training has diverged"] * bool(bad)


def not_linear(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Modules of `model` that keys of a file adapt although no such kind gets LoRA here, and why that is an error."""
    modules = dict(named_modules(model))
    reasons: dict[str, str] = {}
    for key in sorted(keys):
        place, adapts, _ = key.removeprefix(PREFIX).partition(".lora_")
        module = modules.get(place)
        known = module is None or isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module) or is_other(module)
        if adapts and not known:
            reasons[place] = (
                f"{key!r} adapts {place} ({type(module).__name__}), and only linear layers, Conv2d and Embedding get LoRA: "
                "load it with PEFT, where accelerate(model) takes the linear layers, or train one without it"
            )
    return reasons


def _unknown(model: nn.Module, saved: dict[str, Tensor], expected: dict[str, Form], base: dict[str, Tensor]) -> list[str]:
    """Why keys that are not the adapter's are errors, but for what PEFT writes beside it and which says nothing new."""
    keys = sorted(saved.keys() - expected.keys())
    others = not_linear(model, keys)
    reasons = list(others.values())
    for key in keys:
        if key.removeprefix(PREFIX).partition(".lora_")[0] in others:
            continue
        # near keys are for the first ones, which are shown: to look for them takes as long as everything else
        if (reason := _why_unknown(key, saved, expected, base, near=len(reasons) < SHOWN)) is not None:
            reasons.append(reason)
    return reasons


def _why_unknown(
    key: str, saved: dict[str, Tensor], expected: dict[str, Form], base: dict[str, Tensor], *, near: bool
) -> str | None:
    for inside in (".original_module.", ".modules_to_save."):  # with bias="all" PEFT also writes its wrapper's inside
        if inside in key and key.replace(inside, ".") in expected:
            return None
    if key.endswith(f".{MAGNITUDE}") and not any(name.endswith(MAGNITUDE) for name in expected):
        return f"unknown {key!r}, a magnitude of DoRA, but use_dora is not true"
    if key in base:  # embeddings and heads that are adapted, or were resized, are saved whole
        own, theirs = base[key], saved[key]
        if own.shape == theirs.shape and same_values(own, theirs).all():
            return None
        if own.dim() == theirs.dim() == 2 and own.shape[1] == theirs.shape[1] and own.shape[0] != theirs.shape[0]:
            return (
                f"{key!r} has {theirs.shape[0]} rows, and this model's {own.shape[0]}: the adapter was saved after a resize; "
                f"call model.resize_token_embeddings({theirs.shape[0]}) before load_adapter"
            )
        return (
            f"{key!r} holds another base weight than this model's: it belongs to another model; or, if only rows that "
            "resize_token_embeddings added differ, copy it from the file into this model first"
        )
    found = difflib.get_close_matches(key, expected, 1, cutoff=0.8) if near else []
    return f"unknown {key!r}" + (f" (near: {found[0]!r})" if found else "")


def same_values(own: Tensor, theirs: Tensor) -> Tensor:
    """Where two tensors of one shape are equal, at the narrower of their dtypes."""
    narrow = own.dtype if own.dtype.itemsize <= theirs.dtype.itemsize else theirs.dtype
    return full(own).detach().cpu().to(narrow) == theirs.to(narrow)


def check_settings(model: nn.Module, config: LoRAConfig, adapter_name: str, source: Path) -> None:
    """Raise ValueError where the file has, or scales, an adapter that the model has already in another way."""
    layers = {path: layer for path, layer in lora_layers(model).items() if adapter_name in layer.adapters}
    ranks = config.ranks(layers)
    for path, layer in layers.items():
        if layer.adapters[adapter_name].use_dora != config.use_dora:
            raise ValueError(
                f"{source}: use_dora is {config.use_dora}, but this model's adapter {adapter_name!r} was added with "
                f"use_dora={not config.use_dora}; use another adapter name"
            )
        scaling, own = ranks[path].scaling, float(layer.adapters[adapter_name].scaling)
        if abs(own - scaling) > 1e-6 * abs(scaling):
            raise ValueError(
                f"{source}: scales {path} by {scaling:g}, but this model's adapter {adapter_name!r} by {own:g}; "
                "use another adapter name, or the same r, lora_alpha and use_rslora"
            )
