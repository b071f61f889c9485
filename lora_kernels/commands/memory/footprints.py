"""Bytes of QLoRA, LoRA and full fine-tuning for some layers, the layers of well-known models, and those of a model here."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ...models.config import LoRAConfig
from ..layer_shapes import Layers, adapt
from ..pretrained import meta_model

ADAMW_MOMENTS = 2


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


def layers_of_model(directory: Path, config: LoRAConfig, option: str) -> tuple[list[Layers], int]:
    """(the layers that `config` adapts in the model of `directory`, the number of its base parameters).

    Raises CommandError that names `option`, where they come from.
    """
    model = meta_model(directory)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    return adapt(model, config, option), base_parameters


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
