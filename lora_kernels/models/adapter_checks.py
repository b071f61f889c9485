"""Whether an adapter's file fits a model: its tensors and its scaling, with everything that does not in one message."""

import difflib
from pathlib import Path

import torch
from torch import Tensor, nn

from ..dtypes import FLOATS
from .adapter_keys import PREFIX
from .config import LoRAConfig
from .distributed import full
from .state import lora_layers


def check_tensors(
    saved: dict[str, Tensor], expected: dict[str, tuple[int, ...]], base: dict[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """The tensors of `expected` from the file. Raises ValueError for anything missing, unknown, of another shape or dtype."""
    unprefixed = [key for key in saved if not key.startswith(PREFIX)]
    if unprefixed or not saved:
        raise ValueError(
            f"{source}: expected keys that begin with {PREFIX!r}, got {sorted(saved)[:3]}; save it with PEFT's save_pretrained"
        )
    problems = []
    missing = sorted(expected.keys() - saved.keys())
    if missing:
        problems.append(f"missing {len(missing)} of {len(expected)}, such as {missing[0]!r}")
    for key in sorted(saved.keys() - expected.keys()):
        if (reason := _why_unknown(key, saved, expected, base)) is not None:
            problems.append(reason)
    for key in sorted(expected.keys() & saved.keys()):
        if tuple(saved[key].shape) != expected[key]:
            problems.append(f"{key!r} has shape {tuple(saved[key].shape)}, expected {expected[key]}")
        elif ".lora_" in key and saved[key].dtype not in FLOATS:
            problems.append(f"{key!r} has dtype {saved[key].dtype}, expected a floating-point one")
    if problems:
        more = f"; and {len(problems) - 4} more" * (len(problems) > 4)
        raise ValueError(f"{source} does not fit this model, nothing was changed: " + "; ".join(problems[:4]) + more)
    return {key: saved[key] for key in expected}


def _why_unknown(
    key: str, saved: dict[str, Tensor], expected: dict[str, tuple[int, ...]], base: dict[str, Tensor]
) -> str | None:
    """Why a key that is not the adapter's is an error; None for what PEFT writes beside it and which says nothing new."""
    for inside in (".original_module.", ".modules_to_save."):  # with bias="all" PEFT also writes its wrapper's inside
        if inside in key and key.replace(inside, ".") in expected:
            return None
    if key in base:  # embeddings and heads that are adapted, or were resized, are saved whole
        own, theirs = base[key], saved[key]
        narrow = own.dtype if own.dtype.itemsize <= theirs.dtype.itemsize else theirs.dtype
        if own.shape == theirs.shape and torch.equal(full(own).detach().cpu().to(narrow), theirs.to(narrow)):
            return None
        return f"{key!r} holds another base weight than this model's: it belongs to another, or a resized, model"
    near = difflib.get_close_matches(key, expected, 1, cutoff=0.8)
    return f"unknown {key!r}" + f" (near: {near[0]!r})" * bool(near)


def check_scaling(model: nn.Module, config: LoRAConfig, adapter_name: str, source: Path) -> None:
    """Raise ValueError where the file scales an adapter that the model has already in another way."""
    for path, layer in lora_layers(model).items():
        if adapter_name not in layer.adapters:
            continue
        scaling, own = config.scaling(path), float(layer.adapters[adapter_name].scaling)
        if abs(own - scaling) > 1e-6 * abs(scaling):
            raise ValueError(
                f"{source}: scales {path} by {scaling:g}, but this model's adapter {adapter_name!r} by {own:g}; "
                "use another adapter name, or the same r, lora_alpha and use_rslora"
            )
