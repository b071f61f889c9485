"""Several adapters of a layer in one batch: which samples, along x's first dimension, are whose."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.grouped_linear import multi_lora_linear
from ..segments import Segments
from ..values import LoRAAdapter


class Mixed(NamedTuple):
    """names: of each sample's adapter, None for the base alone. adapters: those of them that the layer has, each once."""

    names: tuple[str | None, ...]
    adapters: tuple[str, ...]


def forward_mixed(layer: Any, x: Tensor, mixed: Mixed) -> Tensor:
    """y of a LoRALinear, each sample with its adapter. Raises KeyError for one that was deleted meanwhile."""
    for name in mixed.adapters:
        layer._require(name)
    weights = [layer._weights(name) for name in mixed.adapters]
    ps = [layer.adapters[name].lora_dropout if layer.training else 0.0 for name in mixed.adapters]
    adapters = [LoRAAdapter(w.lora_A, w.lora_B, w.scaling, p) for w, p in zip(weights, ps, strict=True)]  # type: ignore[arg-type]
    return multi_lora_linear(x, layer.matrix, adapters, segments_of(x, mixed), layer.bias)


def why_not_mixed(layer: Any, name: str) -> str | None:
    """What a LoRALinear's adapter has beside A and B, which the samples of one batch cannot each have; None if nothing."""
    if name in layer.lora_magnitude:
        return "a magnitude (DoRA)"
    if name in layer.lora_bias:
        return "a bias of its own (lora_bias)"
    return None if layer.initial_term is None else "an initialisation that rewrote the weight"


def segments_of(x: Tensor, mixed: Mixed) -> Segments:
    """The segments of x's rows: one sort for all layers that have the same adapters, at each step with these names."""
    if x.ndim < 2 or x.shape[0] != len(mixed.names):
        raise ValueError(
            f"names: got {len(mixed.names)} for x {tuple(x.shape)}, expected one for each sample of its first dimension"
        )
    of = _segments if type(x) is Tensor and not torch.compiler.is_compiling() else _segments.__wrapped__
    return of(mixed, math.prod(x.shape[1:-1]), x.device)


@functools.lru_cache(maxsize=16)
def _segments(mixed: Mixed, rows: int, device: torch.device) -> Segments:
    numbers: dict[str | None, int] = {name: i for i, name in enumerate(mixed.adapters)}
    with torch.inference_mode(False):  # a later step may train
        ids = torch.tensor([numbers.get(name, -1) for name in mixed.names])
        return Segments.from_ids(ids.repeat_interleave(rows), len(numbers)).to(device)
