"""The shapes of linear layers with adapters: from KxN:COUNT on the command line, or from the layers of a model."""

import re
import sys
import warnings
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
from .options import MAX_COUNT

SEED_BYTES = 8
SHAPE, ONE_SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+))?"), re.compile(r"(\d+)x(\d+)()")


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
    expected = "KxN or KxN:COUNT, positive, as in 4096x14336:32"
    return [Layers(K, N, count, rank) for K, N, count in (_numbers(text, SHAPE, expected) for text in shapes)]


def parse_shape(text: str) -> tuple[int, int]:
    """ "4096x14336" -> K=4096, N=14336: of one layer, where a count has no meaning. Raises CommandError."""
    K, N, _ = _numbers(text, ONE_SHAPE, "KxN, positive, as in 4096x14336")
    return K, N


def _numbers(text: str, pattern: re.Pattern[str], expected: str) -> list[int]:
    match = pattern.fullmatch(text)
    numbers = [int(number or 1) for number in match.groups()] if match else [0]
    if 0 in numbers or max(numbers) > MAX_COUNT:
        raise CommandError(f"--shape: got {text!r}, expected {expected}, numbers up to {MAX_COUNT}")
    return numbers


def group_layers(model: nn.Module) -> list[Layers]:
    """The LoRALinear layers of `model`, equal shapes and ranks together."""
    adapted = (module for module in model.modules() if isinstance(module, LoRALinear))
    shapes = Counter((layer.in_features, layer.out_features, A.shape[0]) for layer in adapted for A in layer.lora_A.values())
    return [Layers(K, N, count, R) for (K, N, R), count in shapes.items()]


def adapt(model: nn.Module, config: LoRAConfig, what: str) -> list[Layers]:
    """add_lora on a model without weights: its adapted layers. What add_lora says is told after `what`.

    Raises CommandError for its errors; its warnings are lines on stderr: a place in the source is no help to who typed a name.
    """
    with warnings.catch_warnings(record=True) as doubts:
        warnings.simplefilter("always")
        try:
            add_lora(model, config)
        except (ValueError, TypeError) as error:
            raise CommandError(f"{what}: {error}") from error
    for doubt in doubts:
        print("lora-kernels:", f"{what}:", *str(doubt.message).split(), file=sys.stderr)
    return group_layers(model)
