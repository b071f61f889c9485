"""What `lora-kernels bench --model` times, checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .. import pretrained
from ..options import check_count
from .peers import ACCELERATED, BNB, FUSED, OURS, OURS_NF4, PEFT


class Names(NamedTuple):
    """Of the variants beside the bare model."""

    ours: str
    fused: str
    peer: str
    accelerated: str


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
    dora: bool = False

    @property
    def names(self) -> Names:
        ours, peer = (OURS_NF4, BNB) if self.quantize else (OURS, PEFT)
        return Names(ours, ours + FUSED, peer, ACCELERATED[peer])

    def check(self) -> None:
        """Raise CommandError for values that fit a layer and no model, and for a directory that has none."""
        for tokens in self.tokens:
            check_count("--tokens", tokens, low=2)  # a loss is of the next token
        check_count("--sequence-length", self.length, low=2)
        pretrained.check_directory(self.model)
