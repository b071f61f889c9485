"""A case of lora_linear_group: q, k, v … over one x."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..functional.linear import lora_linear_group
from ..reference import linear as reference
from ..values import Dropout, LoRAWeights
from .members import Layer, MembersCase


@dataclass
class GroupCase(MembersCase):
    """The group of `members` by name over x[M, K]."""

    NAMES: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "r")
    K: int = 24
    members: tuple[Layer, ...] = (Layer(33), Layer(10, 3, scaling=0.5), Layer(9, None, bias=False))

    def layers(self) -> dict[str, tuple[int, Layer]]:
        return {name: (self.K, layer) for name, layer in zip(self.NAMES, self.members, strict=False)}

    def widths(self) -> dict[str, int]:
        return {name: layer.N for name, (_, layer) in self.layers().items()}

    def call(self, x: Tensor, members: dict[str, LoRAWeights]) -> tuple[Tensor, ...]:
        return lora_linear_group(x, list(members.values()), dropout_p=self.p, seed=self.seed)

    def equations(self, x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None) -> tuple[Tensor, ...]:
        return reference.forward(x, members, dropout)[0]
