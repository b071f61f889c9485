"""A case of lora_glu_mlp; without `gate` it is a plain MLP."""

from dataclasses import dataclass, replace

from torch import Tensor

from ..functional.glu_mlp import lora_glu_mlp
from ..reference import glu_mlp as reference
from ..values import Dropout, LoRAWeights
from .members import Layer, MembersCase

GATE, UP, DOWN = Layer(0), Layer(0, 3, scaling=0.5), Layer(0, 5, bias=False)  # their N is the case's I or N


@dataclass
class Case(MembersCase):
    """x[M, K] -> y[M, N] by way of I features."""

    K: int = 24
    I: int = 40  # noqa: E741
    N: int = 21
    activation: str = "silu"
    gate: Layer | None = GATE
    up: Layer = UP
    down: Layer = DOWN

    @property
    def offset(self) -> int:  # type: ignore[override]
        return 0 if self.gate else 1

    def layers(self) -> dict[str, tuple[int, Layer]]:
        gate = {} if self.gate is None else {"gate": (self.K, replace(self.gate, N=self.I))}
        return {**gate, "up": (self.K, replace(self.up, N=self.I)), "down": (self.I, replace(self.down, N=self.N))}

    def widths(self) -> dict[str, int]:
        return {"y": self.N}

    def call(self, x: Tensor, members: dict[str, LoRAWeights]) -> tuple[Tensor, ...]:
        own = [members.get(name) for name in ("gate", "up", "down")]
        return (lora_glu_mlp(x, *own, activation=self.activation, dropout_p=self.p, seed=self.seed),)  # type: ignore[arg-type]

    def equations(self, x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None) -> tuple[Tensor, ...]:
        return reference.forward(x, members, dropout, self.activation)[0]
