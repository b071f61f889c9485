"""The shapes of linear layers with adapters: from KxN:COUNT on the command line, or from the layers of a model."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..functional.nf4 import quantize_nf4
from ..layers.linear import LoRALinear
from ..models.config import LoRAConfig
from ..models.surgery import add_lora
from .console import CommandError

SEED_BYTES = 8
SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class Layers:
    """`count` linear layers K -> N with adapters of rank R."""

    K: int
    N: int
    count: int
    R: int

    @property
    def adapter_parameters(self) -> int:
        return self.count * self.R * (self.K + self.N)

    def saved_bytes(self, M: int, itemsize: int, dropout: bool) -> int:
        """h[M,R] in the adapter's dtype for every layer, and the seed."""
        return self.count * (M * self.R * itemsize + (SEED_BYTES if dropout else 0))

    @property
    def parameters(self) -> int:
        return self.count * self.K * self.N

    @property
    def nf4_bytes(self) -> int:
        """The weights in NF4: that of an NF4Weight without values."""
        return self.count * quantize_nf4(torch.empty(self.N, self.K, device="meta")).nbytes


def parse_shapes(shapes: Iterable[str], rank: int) -> list[Layers]:
    """["4096x14336:32"] -> 32 layers K=4096, N=14336; the count is 1 where it is left out. Raises CommandError."""
    result = []
    for text in shapes:
        match = SHAPE.fullmatch(text)
        if not match or 0 in (numbers := [int(number or 1) for number in match.groups()]):
            raise CommandError(f"--shape: got {text!r}, expected KxN or KxN:COUNT, positive, as in 4096x14336:32")
        K, N, count = numbers
        result.append(Layers(K, N, count, rank))
    check_rank(result)
    return result


def check_rank(layers: Iterable[Layers]) -> None:
    """Raise CommandError unless every rank is from 1 to min(K, N): more cannot express more than W itself."""
    for group in sorted(layers, key=lambda group: min(group.K, group.N)):  # the tightest limit is the useful one
        limit = min(group.K, group.N)
        if not 1 <= group.R <= limit:
            raise CommandError(f"--rank: got {group.R}, expected 1 to {limit} for the layer {group.K}x{group.N}")


def group_layers(model: nn.Module) -> list[Layers]:
    """The LoRALinear layers of `model`, equal shapes and ranks together."""
    adapted = (module for module in model.modules() if isinstance(module, LoRALinear))
    shapes = Counter((layer.in_features, layer.out_features, A.shape[0]) for layer in adapted for A in layer.lora_A.values())
    return [Layers(K, N, count, R) for (K, N, R), count in shapes.items()]


def adapt(model: nn.Module, config: LoRAConfig, what: str) -> list[Layers]:
    """add_lora on a model without weights: its adapted layers. Raises CommandError: what add_lora says, after `what`."""
    try:
        add_lora(model, config)
    except (ValueError, TypeError) as error:
        raise CommandError(f"{what}: {error}") from error
    layers = group_layers(model)
    check_rank(layers)
    return layers
