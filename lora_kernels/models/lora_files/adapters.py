"""Factors as an adapter of a model, a LoRAConfig and tensors under PEFT's keys, and the reverse."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...layers.adapters import scaling
from ..adapter_keys import KEYS, PREFIX, Form
from ..config import LoRAConfig
from ..names import names_match, tails
from ..state import lora_layers
from ..wrappers import named_modules
from .factors import Factors


def config_of(factors: Mapping[str, Factors], paths: Collection[str]) -> LoRAConfig:
    """What add_lora would be given for exactly these factors, by path, in a model with modules at `paths`.

    Raises ValueError where some have DoRA's magnitude or a bias and others have not.
    """
    for what, has in (("DoRA's magnitude", _has_magnitude), ("a bias", _has_bias)):
        without = [each.key for each in factors.values() if not has(each)]
        if without and len(without) < len(factors):
            raise ValueError(f"{without[0]!r} has no {what} beside, and others have: expected it in all, or in none")
    patterns = _patterns(factors, paths)
    r, ranks = _most({path: each.r for path, each in factors.items()}, patterns)
    alpha, alphas = _most({path: each.alpha for path, each in factors.items()}, patterns)
    one = next(iter(factors.values()))
    return LoRAConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=_targets(sorted(factors), paths),
        use_dora=_has_magnitude(one),
        lora_bias=_has_bias(one),
    )


def tensors_of(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Under PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for path, each in factors.items():
        own = {"lora_A": each.A, "lora_B": each.B, "lora_bias": each.bias, "lora_magnitude": each.magnitude}
        tensors |= {f"{PREFIX}{path}.{KEYS[kind]}": tensor for kind, tensor in own.items() if tensor is not None}
    return tensors


def fitted(tensors: dict[str, Tensor], expected: Mapping[str, Form]) -> dict[str, Tensor]:
    """With the 1 × 1 of a convolution over pixels where the model has one, and without it where it has a linear layer."""
    return {
        key: tensor.reshape(expected[key].shape) if key in expected and _alike(tensor.shape, expected[key].shape) else tensor
        for key, tensor in tensors.items()
    }


def factors_of(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors, by path, of an adapter that add_lora gave a model, from its tensors under PEFT's keys.

    Raises ValueError that names a tensor which is none of LoRA's, such as a module that is trained whole.
    """
    found: dict[str, Factors] = {}
    left = set(tensors)
    for path, layer in lora_layers(model).items():
        if adapter_name not in layer.adapters:
            continue
        settings = layer.adapters[adapter_name]
        keys = {kind: f"{PREFIX}{path}.{key}" for kind, key in KEYS.items()}
        A, B, bias, magnitude = (tensors.get(keys[kind]) for kind in ("lora_A", "lora_B", "lora_bias", "lora_magnitude"))
        if A is None or B is None:
            cure = "; call compact_ranks(model) first" * settings.use_adalora
            raise ValueError(f"{path}: its adapter is no product of lora_B and lora_A, and only PEFT's format has it{cure}")
        s, r = float(settings.scaling), settings.r
        alpha = settings.lora_alpha if scaling(r, settings.lora_alpha) == s else s * r
        found[path] = Factors(A, B, alpha, magnitude, bias, keys["lora_A"])
        left -= set(keys.values())
    if left:
        raise ValueError(f"adapter {adapter_name!r}: {min(left)!r} is no part of a LoRA, and only PEFT's format has it")
    return found


def rescaled(factors: Mapping[str, Factors], config: LoRAConfig) -> dict[str, Factors]:
    """With the scalings that a file's own configuration says. Raises ValueError where it says another rank."""
    ranks = config.ranks(factors)
    for path, each in factors.items():
        if ranks[path].r != each.r:
            raise ValueError(f"{each.key!r} is of rank {each.r}, and the configuration beside says {ranks[path].r} for {path}")
    alphas = {path: rank.scaling * rank.r if config.use_rslora else rank.lora_alpha for path, rank in ranks.items()}
    return {path: replace(each, alpha=alphas[path]) for path, each in factors.items()}


def _has_magnitude(factors: Factors) -> bool:
    return factors.magnitude is not None


def _has_bias(factors: Factors) -> bool:
    return factors.bias is not None


def _most(values: Mapping[str, Any], patterns: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the patterns of the others' paths."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {patterns[path]: value for path, value in values.items() if value != most}


def _patterns(adapted: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """A pattern for each path alone; a "^" keeps it from those with the same end, and costs a regex's trial at each path."""
    ends = {tail for path in paths for tail in tails(path)[1:]}
    return {path: f"{'^' * (path in ends)}{re.escape(path)}" for path in adapted}


def _targets(adapted: list[str], paths: Collection[str]) -> list[str] | str:
    """The paths themselves; a regex for them where one is the end of another module's."""
    matched = {path for path in paths if names_match(path, set(adapted))}
    return adapted if matched <= set(adapted) else "|".join(re.escape(path) for path in adapted)


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    short, long = sorted((tuple(one), tuple(other)), key=len)
    return long[: len(short)] == short and all(size == 1 for size in long[len(short) :])


def paths_in(model: nn.Module) -> list[str]:
    return [path for path, _ in named_modules(model)]
