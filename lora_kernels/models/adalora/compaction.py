"""A plain LoRA of the ranks that are left in place of AdaLoRA: pruned triplets are gone, E is in A."""

import re
from dataclasses import replace

import torch
from torch import nn

from ...layers.adapters import AdaptedWeight
from ..config import LoRAConfig
from ..distributed import is_sharded
from ..state import lora_state, refuse_if_merged, refuse_in_fsdp1, refuse_offloaded_adapters
from .config import active_adalora


def compact_ranks(model: nn.Module) -> dict[str, int]:
    """Make the active AdaLoRA adapter a plain LoRA with A' = E ⊙ A and B of the triplets with E ≠ 0: the same function, to the
    rounding of a sum over fewer terms. Rank by the layer's path.

    Each layer keeps its scaling, so that α is another for each rank: save_adapter writes PEFT's LORA with rank_pattern and
    alpha_pattern. A layer without singular values loses the adapter and computes its base, 0 in the result; the file does not
    name it, for PEFT loads no rank of 0. Parameters are new ones: give them to an optimizer to train on.
    Raises ValueError where the active adapter is not one of AdaLoRA, is sharded, or has no singular value at all, and
    RuntimeError while merged, or where accelerate offloads the adapters.
    """
    refuse_in_fsdp1(model, "compact ranks")
    name, config, layers = active_adalora(model)
    refuse_if_merged(layers, "compact ranks")
    refuse_offloaded_adapters(model, "compact ranks")
    values = {path: layer.lora_E[name] for path, layer in layers.items()}
    if any(is_sharded(E) for E in values.values()):
        raise ValueError(
            "model: FSDP2 has sharded its adapters; save the adapter, load it into a whole model, and compact that"
        )
    ranks = {path: int(E.count_nonzero()) for path, E in values.items()}
    if not any(ranks.values()):
        raise ValueError(f"adapter {name!r}: got no singular value that is not zero, expected a trained adapter")
    if config.bias == "lora_only":  # the bias of a layer without the adapter would not be this adapter's in a file
        ranks = {path: max(r, 1) for path, r in ranks.items()}
    scaling = float(next(iter(layers.values())).adapters[name].scaling)
    for path, layer in layers.items():
        _compact(layer, name, ranks[path])
    state = lora_state(model)
    state.configs[name] = _with_ranks(config.plain(), {path: r for path, r in ranks.items() if r}, scaling)
    state.allocations.pop(name, None)
    return ranks


@torch.no_grad()
def _compact(layer: AdaptedWeight, name: str, r: int) -> None:
    """Make adapter `name` of one layer a plain one of rank r, or remove it where r is 0."""
    if not r:
        layer.delete_adapter(name)
        return
    A, B, keep = layer.lora_A[name], layer.lora_B[name], layer.lora_E[name][:, 0] != 0
    if not keep.any():
        keep[0] = True  # a triplet of zeros
    own = {"lora_A": (layer.right(name)[keep], A), "lora_B": (B[:, keep].contiguous(), B)}
    for kind, (tensor, old) in own.items():
        getattr(layer, kind)[name] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    del layer.lora_E[name]
    adapter = layer.adapters[name]
    layer.adapters[name] = replace(adapter, r=r, lora_alpha=float(adapter.scaling) * r, use_adalora=False)


def _with_ranks(config: LoRAConfig, ranks: dict[str, int], scaling: float) -> LoRAConfig:
    """config with α/r = scaling at these ranks. A pattern's "^" keeps it from other paths with the same end."""
    r = max(ranks.values())
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    alphas = {pattern: scaling * rank for pattern, rank in others.items()}
    return replace(config, r=r, lora_alpha=scaling * r, rank_pattern=others, alpha_pattern=alphas)
