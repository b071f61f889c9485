"""Several adapters of a model as one, by PEFT's rules."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import AdaptedWeight, check_adapter_name
from ..layers.lora_experts import LoRAStack, stacked
from ..layers.merging import LowRankTerm
from .adalora.config import AdaLoRAConfig
from .config import LoRAConfig
from .exchanges import add_exchanges, plan_exchanges
from .state import (
    LoRAState,
    adapted_layers,
    lora_exchanges,
    lora_state,
    refuse_if_merged,
    refuse_in_fsdp1,
    refuse_offloaded_adapters,
)
from .targets import plan_modules_to_save

COMBINATIONS = ("linear", "cat")
Part = tuple[str, float]  # an adapter and the weight of its B·A: what it is given, times its scaling


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "linear",
) -> None:
    """Add an adapter with A = Σ ±√|wᵢsᵢ|·Aᵢ and B = Σ √|wᵢsᵢ|·Bᵢ ("linear"), or B·A = Σ wᵢsᵢ·Bᵢ·Aᵢ exactly ("cat").

    The numbers of PEFT's add_weighted_adapter, but with rsLoRA, whose scaling PEFT applies to the combination once more, and
    for own biases (lora_bias), which PEFT drops and which become Σ wᵢsᵢ·bᵢ here. A negative weight's sign is A's. "linear"
    keeps the rank, which must be the same in a layer, and mixes Bᵢ with Aⱼ; "cat" puts A and B side by side, so that ranks add
    up. The sum in a layer is over those of `adapters` that it has. A bias or a module that one of them trains is copied. The
    new adapter's scaling is 1; it waits for `set_adapter`.

    weights: numbers, of numpy too, or 0-d tensors.

    Raises KeyError for an unknown adapter, ValueError for one with DoRA, a name in use, another combination_type, weights that
    are not as many finite numbers, ranks that differ, or modules that several train, and RuntimeError while merged or where
    accelerate offloads the adapters; then nothing has changed.
    """
    refuse_in_fsdp1(model, "combine adapters")
    layers, state = adapted_layers(model), lora_state(model)
    weights = check_combined(state, adapters, weights)
    _check(layers, state, adapters, adapter_name, combination_type)
    refuse_if_merged(layers, "add an adapter")
    lora_exchanges(model)  # checks them
    refuse_offloaded_adapters(model, "combine adapters")
    parts = {path: _parts(layer, adapters, weights) for path, layer in layers.items()}
    parts = {path: found for path, found in parts.items() if found}
    ranks = {path: _rank(path, layers[path], found, combination_type) for path, found in parts.items()}
    config = _config(state, adapters, ranks)
    originals = plan_exchanges(model, config, plan_modules_to_save(model, config), set(parts))
    try:
        for path, found in parts.items():
            _combine(layers[path], found, adapter_name, combination_type, config.lora_dropout)
    except BaseException:
        for layer in layers.values():
            if adapter_name in layer.adapters:
                layer.delete_adapter(adapter_name)
        raise
    state.configs[adapter_name] = config
    add_exchanges(state.exchanges, adapter_name, originals)
    for exchange in state.exchanges:
        for adapter in adapters:
            if adapter in exchange.choices:
                exchange.choices[adapter_name] = deepcopy(exchange.choices[adapter])


def weighted_term(layer: AdaptedWeight, adapters: Sequence[str], weights: Sequence[float]) -> LowRankTerm | None:
    """Σ wᵢsᵢ·Bᵢ·Aᵢ and Σ wᵢsᵢ·bᵢ of those of `adapters` that a layer has, exactly, by stacking; None where it has none."""
    parts = _parts(layer, adapters, weights)
    if not parts:
        return None
    with torch.no_grad():
        A, B, bias = _stacked(layer, parts)
        if isinstance(layer, LoRAStack):
            A, B = stacked(A, B, layer.stack)
    return LowRankTerm(A, B, 1.0, bias)


def check_combined(state: LoRAState, adapters: Sequence[str], weights: Iterable[Any]) -> list[float]:
    """The weights as floats. Raises KeyError or ValueError for adapters and weights of which there is no weighted sum."""
    names = isinstance(adapters, Collection) and not isinstance(adapters, str) and all(isinstance(a, str) for a in adapters)
    if not names or not adapters or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters: got {adapters!r}, expected a list of different names")
    for adapter in adapters:
        if adapter not in state.configs:
            raise KeyError(f"adapter {adapter!r}: not found; adapters here: {list(state.configs)}, made by add_lora")
        if state.configs[adapter].use_dora:
            raise ValueError(
                f"adapters: {adapter!r} is a DoRA adapter, expected adapters without a magnitude: (m / n) ⊙ (W + s·B·A) is no "
                "sum of W and a product of small matrices; merge it into the base, or save a merged model (save_merged)"
            )
    return _finite(weights, adapters)


def _check(
    layers: dict[str, AdaptedWeight], state: LoRAState, adapters: Sequence[str], adapter_name: str, combination_type: str
) -> None:
    check_adapter_name(adapter_name, "adapter_name")
    here = list(dict.fromkeys([*state.configs, *(name for layer in layers.values() for name in layer.adapters)]))
    if adapter_name in here:  # a layer's own add_adapter makes some that no config is for
        raise ValueError(f"adapter_name: got {adapter_name!r}, which is in use; adapters here: {here}")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type: got {combination_type!r}, expected one of {COMBINATIONS}")
    for exchange in state.exchanges:
        if len(trained := [adapter for adapter in adapters if adapter in exchange.choices]) > 1:
            raise ValueError(f"adapters: {trained} all train {exchange.name}, and there is no weighted combination of that")


def _finite(weights: Iterable[Any], adapters: Sequence[str]) -> list[float]:
    """The weights as floats."""
    try:
        numbers = [_as_float(w) for w in weights]
    except (TypeError, OverflowError):  # no iterable; no number; an integer that no float can hold
        numbers = []
    if len(numbers) != len(adapters) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"weights: got {weights!r}, expected a finite number for each of {list(adapters)}")
    return numbers


def _as_float(number: Any) -> float:
    """Python's, numpy's and 0-d tensors' real numbers. Raises TypeError for anything else, OverflowError for a huge integer."""
    tensor = isinstance(number, Tensor) and number.ndim == 0 and number.dtype != torch.bool and not number.is_complex()
    if isinstance(number, bool) or not (tensor or isinstance(number, Real)):
        raise TypeError
    return float(number)


def _rank(path: str, layer: AdaptedWeight, parts: list[Part], combination_type: str) -> int:
    """The combination's rank in a layer. Raises ValueError where "linear" finds several."""
    ranks = {name: layer.adapters[name].r for name, _ in parts}
    if combination_type == "cat":
        return sum(ranks.values())
    if len(set(ranks.values())) > 1:
        raise ValueError(f'adapters: in {path} their ranks are {ranks}, expected one for "linear"; use "cat"')
    return next(iter(ranks.values()))


def _parts(layer: AdaptedWeight, adapters: Sequence[str], weights: Sequence[float]) -> list[Part]:
    pairs = zip(adapters, weights, strict=True)
    return [(name, w * float(layer.adapters[name].scaling)) for name, w in pairs if name in layer.adapters]


@torch.no_grad()
def _combine(layer: AdaptedWeight, parts: list[Part], adapter_name: str, combination_type: str, lora_dropout: float) -> None:
    """Add the combination of `parts` to one layer; it is computed in float32 or wider, and rounded once."""
    A, B, bias = _stacked(layer, parts)
    if combination_type == "linear":
        As, Bs = [_wide(layer.right(name)) for name, _ in parts], [_wide(layer.left(name)) for name, _ in parts]
        A = torch.stack([math.copysign(abs(w) ** 0.5, w) * A for (_, w), A in zip(parts, As, strict=True)]).sum(0)
        B = torch.stack([abs(w) ** 0.5 * B for (_, w), B in zip(parts, Bs, strict=True)]).sum(0)
    dtype, r = layer.lora_A[parts[0][0]].dtype, A.shape[0] // layer.stack
    layer.add_adapter(adapter_name, r, r, lora_dropout=lora_dropout, lora_bias=bias is not None, dtype=dtype)
    layer.lora_A[adapter_name].copy_(A.view(layer.lora_A[adapter_name].shape))
    layer.lora_B[adapter_name].copy_(B.view(layer.lora_B[adapter_name].shape))
    if bias is not None:
        layer.lora_bias[adapter_name].copy_(bias)


def _stacked(layer: AdaptedWeight, parts: list[Part]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(A, B, b): all wᵢsᵢ·Aᵢ below each other, all Bᵢ side by side, Σ wᵢsᵢ·bᵢ where there is a bias; in float32 or wider."""
    As, Bs = [w * _wide(layer.right(name)) for name, w in parts], [_wide(layer.left(name)) for name, _ in parts]
    own = layer.stack, -1  # of stacks: an expert's rows of A are together, and a rank's columns of B
    A = torch.cat([A.unflatten(0, own) for A in As], 1).flatten(0, 1)
    B = torch.cat([B.unflatten(1, own[::-1]) for B in Bs], 1).flatten(1)
    biases = [w * _wide(layer.lora_bias[name]) for name, w in parts if name in layer.lora_bias]
    return A, B, torch.stack(biases).sum(0) if biases else None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _config(state: LoRAState, adapters: Sequence[str], ranks: dict[str, int]) -> LoRAConfig:
    """What add_lora would have been given for layers of these ranks and a scaling of 1, which rsLoRA would not be.

    A pattern's "^" keeps it from other paths with the same end: "0" alone is "1.0" too.
    """
    configs = [state.configs[adapter] for adapter in adapters]
    configs = [config.plain() if isinstance(config, AdaLoRAConfig) else config for config in configs]
    r = max(ranks.values())
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    saved = sorted({name for config in configs for name in config.modules_to_save or []})
    return replace(
        configs[0],
        r=r,
        lora_alpha=r,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        use_rslora=False,
        target_modules=sorted(ranks),
        exclude_modules=None,
        init_lora_weights=True,
        lora_bias=any(config.lora_bias for config in configs),
        bias=next((config.bias for config in configs if config.bias != "none"), "none"),
        modules_to_save=saved or None,
    )
