"""What `lora-kernels bench --model` times, checked."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .. import pretrained
from ..console import CommandError
from .peers import BNB, OURS, OURS_NF4, PEFT


@dataclass(frozen=True)
class Settings:
    """What is timed: every combination of tokens, ranks and dropouts. length: tokens of one sequence, at most."""

    model: Path
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    dtype: torch.dtype
    length: int
    quantize: str | None = None  # "nf4": this package's 4-bit layers beside bitsandbytes' under PEFT

    @property
    def names(self) -> tuple[str, str]:
        """The variants beside the bare model: this package's and the peer's."""
        return (OURS_NF4, BNB) if self.quantize else (OURS, PEFT)

    def check(self) -> None:
        """Raise CommandError for values that need no model to be seen as wrong."""
        for option, values, low, high in (
            ("--tokens", self.tokens, 2, 1 << 40),
            ("--rank", self.ranks, 1, 1 << 20),
            ("--dropout", self.dropouts, 0, 1),
            ("--sequence-length", (self.length,), 2, 1 << 30),
        ):
            for value in values:
                if not low <= value <= high:
                    raise CommandError(f"{option}: got {value}, expected {low} to {high}")
        if self.quantize not in (None, "nf4"):
            raise CommandError(f"--quantize: got {self.quantize!r}, expected nf4, or no --quantize")
        pretrained.check_directory(self.model)
