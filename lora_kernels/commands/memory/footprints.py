"""Bytes of QLoRA, LoRA and full fine-tuning for some layers, the layers of well-known models, and those of a model here."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...layers.projection import features
from ...models.blocks import finding
from ...models.config import LoRAConfig
from ..layer_shapes import Layers, adapt
from ..pretrained import meta_model

ADAMW_MOMENTS = 2


@dataclass(frozen=True)
class Between:
    """Features I between the linear layers of all MLPs together: of those with a gate, and of those without."""

    gated: int = 0
    plain: int = 0

    def saved_bytes(self, M: int, itemsize: int) -> dict[str, int]:
        """Of M tokens, beyond the MLPs' input. Frozen: gate, act(gate) and up; adapters in each layer alone: also what down
        reads, their product; fused: gate and up. Without a gate: up; up and act(up); up.
        """
        counts = {"frozen": (3, 1), "alone": (4, 2), "fused": (2, 1)}
        return {kind: M * itemsize * (g * self.gated + p * self.plain) for kind, (g, p) in counts.items()}


@dataclass(frozen=True)
class Size:
    """The linear layers and vocabulary of a well-known model; all but the embedding and the head are adapted."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int

    def adapted(self, R: int) -> list[Layers]:
        shapes = Counter(
            {(self.hidden, self.hidden): 2, (self.hidden, self.intermediate): 2, (self.intermediate, self.hidden): 1}
        )
        shapes[self.hidden, self.key_value] += 2
        return [Layers(K, N, count * self.layers, R) for (K, N), count in shapes.items()]

    @property
    def between(self) -> Between:
        return Between(gated=self.layers * self.intermediate)

    @property
    def parameters(self) -> int:
        """All of them: the adapted layers, embedding and head, and the norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return sum(group.parameters for group in self.adapted(1)) + 2 * self.vocabulary * self.hidden + norms


SIZES = {
    "7b": Size("Llama-2-7B", 32, 4096, 11008, 4096, 32000),
    "8b": Size("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256),
    "70b": Size("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one way of training, and the number of parameters that it trains."""

    trainable_parameters: int
    weights: int
    adapters: int
    saved_activations: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.saved_activations + self.gradients + self.optimizer


def layers_of_model(directory: Path, config: LoRAConfig, option: str) -> tuple[list[Layers], int, Between]:
    """(the layers that `config` adapts in the model of `directory`, the number of its base parameters, what its MLPs keep).

    Raises CommandError that names `option`, where they come from.
    """
    model = meta_model(directory)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    return adapt(model, config, option), base_parameters, between(model)


def between(model: nn.Module) -> Between:
    """Of the MLPs with adapted layers, found by children and sizes as `fuse_blocks` finds them; it then runs them as well."""
    gated = plain = 0
    for parent in model.modules():
        members = finding.members_of(parent)
        names = finding.mlp_members(members)
        if names is None or not finding.has_activation(parent):
            continue
        sizes = [features(members[name]) for name in names]
        if len(sizes) == 3:  # K, K and I in
            inputs = Counter(K for K, _ in sizes)
            gated += min(inputs, key=lambda K: inputs[K])
        else:
            (_, N), (I, _) = sizes  # noqa: E741
            gated += I if N == 2 * I else 0
            plain += I if N == I else 0
    return Between(gated, plain)


def footprints(
    layers: list[Layers],
    base_parameters: int,
    M: int,
    dropout: bool,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> dict[str, Footprint]:
    """The footprints "qlora", "lora" and "full" for M tokens per step; "full" trains all `base_parameters` of the model."""
    weights, adapter_bytes = base_parameters * dtype.itemsize, adapter_dtype.itemsize
    adapters = sum(group.adapter_parameters for group in layers)
    saved = sum(group.saved_bytes(M, adapter_bytes, dropout) for group in layers)
    size = adapters * adapter_bytes
    nf4 = sum(group.nf4_bytes - group.parameters * dtype.itemsize for group in layers)
    return {
        "qlora": Footprint(adapters, weights + nf4, size, saved, size, ADAMW_MOMENTS * size),
        "lora": Footprint(adapters, weights, size, saved, size, ADAMW_MOMENTS * size),
        "full": Footprint(base_parameters, weights, 0, 0, weights, ADAMW_MOMENTS * weights),
    }
