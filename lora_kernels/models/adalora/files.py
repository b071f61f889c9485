"""PEFT's ADALORA files hold the triplets that its rank_pattern names; a model here has all of them, pruned ones with E = 0."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..adapter_keys import ADALORA_KEYS, PREFIX
from ..state import LoRAState
from .config import AdaLoRAConfig

PATTERN_END = ".lora_E"  # of a key of rank_pattern, behind the layer's path; PEFT had the adapter's name behind it


def expanded(
    tensors: Mapping[str, Tensor], rank_pattern: Any, init_r: int, source: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(a file's tensors with the triplets that it lacks, as zeros; by path which triplets it has).

    Raises ValueError for a rank_pattern that is not {path.lora_E: [True or False, …]}, init_r of them each. Shapes are the
    reader's to check.
    """
    whole, kept = dict(tensors), {}
    if not isinstance(rank_pattern or {}, Mapping):
        raise ValueError(f"{source}: rank_pattern is {rank_pattern!r}, expected an object")
    for name, pattern in (rank_pattern or {}).items():
        path, found, _ = name.partition(PATTERN_END)
        if not found or not isinstance(pattern, list) or not all(isinstance(keep, bool) for keep in pattern):
            raise ValueError(f"{source}: rank_pattern has {name!r}: {pattern!r}, expected 'path.lora_E': [true or false, …]")
        if len(pattern) != init_r:
            raise ValueError(f"{source}: rank_pattern has {len(pattern)} values for {name!r}, expected init_r = {init_r}")
        kept[path] = mask = torch.tensor(pattern, dtype=torch.bool)
        for kind in ADALORA_KEYS:
            key, dim = f"{PREFIX}{path}.{kind}", 1 if kind == "lora_B" else 0
            tensor = whole.get(key)
            if tensor is not None and tensor.ndim == 2 and tensor.shape[dim] == int(mask.sum()):
                shape = list(tensor.shape)
                shape[dim] = len(pattern)
                whole[key] = tensor.new_zeros(shape).index_copy_(dim, mask.nonzero()[:, 0], tensor)
    return whole, kept


def pruned(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[bool]] | None]:
    """(the tensors without pruned triplets, PEFT's rank_pattern), whole ones and None before the ranks are final.

    A pruned triplet whose E an optimizer's momentum has moved since stays: the file computes what the model does.
    """
    small, pattern = dict(tensors), {}
    for path, mask in kept.items():
        keys = {kind: f"{PREFIX}{path}.{kind}" for kind in ADALORA_KEYS}
        keep = mask.cpu() | (tensors[keys["lora_E"]][:, 0] != 0)
        pattern[f"{path}{PATTERN_END}"] = keep.tolist()
        for kind, key in keys.items():
            small[key] = (tensors[key][:, keep] if kind == "lora_B" else tensors[key][keep]).contiguous()
    return small, pattern or None


def warn_if_never_allocated(state: LoRAState, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Of a trained adapter with AdaLoRA whose ranks nobody decided: it was trained as a plain LoRA."""
    config = state.configs[adapter_name]
    if not isinstance(config, AdaLoRAConfig) or not config.init_lora_weights or adapter_name in state.allocations:
        return
    if any(key.endswith(PATTERN_END) and bool(tensor.count_nonzero()) for key, tensor in tensors.items()):
        warnings.warn(
            f"adapter {adapter_name!r}: no RankAllocator has decided its ranks, so that all of init_r = {config.init_r} "
            "singular values were trained in every layer, as by a plain LoRA; call RankAllocator(model).step(global_step) "
            "between backward() and zero_grad() of every training step",
            stacklevel=4,
        )
