"""Merge the adapters of a whole model into its weights, and take them out again."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..layers.adapters import AdaptedWeight
from ..layers.merging import LowRankTerm
from .combining import check_combined, weighted_term
from .distributed import refuse_fsdp2
from .state import adapted_layers, lora_state, refuse_if_merged, refuse_in_fsdp1, refuse_offloaded_adapters


def merge_lora(model: nn.Module, adapters: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Merge the active adapter of every layer into its weight (`LoRALinear.merge`); all layers or, on an error, none.

    adapters: {name: weight}: W + Σ wᵢsᵢ·Bᵢ·Aᵢ of these instead, rounded once, whichever is active; `unmerge_lora` is as exact.

    Returns the relative error of each layer whose 4-bit weight had to be quantised again, by path.
    Raises RuntimeError if merged already, if no adapter is active, or if accelerate offloads the adapters, and ValueError under
    FSDP; for `adapters` KeyError for an unknown one, and ValueError for one with DoRA, which is no sum, or one that trains
    modules or biases whole, and for weights that are not finite numbers.
    """
    refuse_in_fsdp1(model, "merge")
    refuse_fsdp2(model, "merge")
    layers = adapted_layers(model)
    refuse_if_merged(layers, "merge again")
    refuse_offloaded_adapters(model, "merge")
    terms: dict[str, tuple[LowRankTerm, ...]]  # of the active adapter by default
    if adapters is None:
        terms = {path: () for path, layer in layers.items() if layer.active_adapter is not None}
    else:
        terms = _weighted(model, layers, adapters)
    if not terms:
        raise RuntimeError("cannot merge: no adapter is active; call set_adapter(model, name) first")
    try:
        errors = {path: layers[path].merge(*term) for path, term in terms.items()}
    except BaseException:
        for path in terms:
            if layers[path].merged:
                layers[path].unmerge()
        raise
    return {path: error for path, error in errors.items() if error is not None}


def _weighted(
    model: nn.Module, layers: Mapping[str, AdaptedWeight], adapters: Mapping[str, Any]
) -> dict[str, tuple[LowRankTerm, ...]]:
    """Σ wᵢsᵢ·Bᵢ·Aᵢ by path, for the layers that have one of the adapters."""
    weights = check_combined(lora_state(model), list(adapters), list(adapters.values()))
    for exchange in lora_state(model).exchanges:
        if whole := [name for name in adapters if name in exchange.choices]:
            raise ValueError(f"adapters: {whole} train {exchange.name} whole, which is no low-rank term; merge it alone")
    terms = {path: weighted_term(layer, list(adapters), weights) for path, layer in layers.items()}
    return {path: (term,) for path, term in terms.items() if term is not None}


def unmerge_lora(model: nn.Module) -> None:
    """Take the merged adapters out of the weights again, bit-exactly. Raises RuntimeError if nothing is merged,
    or if accelerate keeps a merged weight together with the adapters of its layer.
    """
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("cannot unmerge: no layer is merged")
    refuse_offloaded_adapters(model, "unmerge", on_their_own=False)
    for layer in merged:
        layer.unmerge()
