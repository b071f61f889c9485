"""The options of `lora-kernels demo`, checked, and the sizes that follow from them."""

from dataclasses import dataclass
from pathlib import Path

from ...models.adalora.config import AdaLoRAConfig
from ...models.config import LoRAConfig
from ..console import CommandError
from ..options import parse_variant

CPU_TOKENS, GPU_TOKENS = 256, 4096  # of one step
MIN_WINDOW, MAX_WINDOW = 16, 512  # tokens of one sequence; four a step where that fits: one alone is a noisy loss


@dataclass(frozen=True)
class Settings:
    """The options of the command, under their names there."""

    model: Path | None
    text: Path | None
    output: Path
    rank: int
    alpha: float
    dropout: float
    steps: int
    tokens_per_step: int | None
    lr: float
    seed: int
    quantize: str | None = None
    variant: str = "lora"

    def check(self) -> None:
        """Raise CommandError for values that need no model to be seen as wrong."""
        for option, value, ok, expected in (
            ("--rank", self.rank, self.rank >= 1, "at least 1"),
            ("--alpha", self.alpha, 0 < self.alpha < float("inf"), "a positive number"),
            ("--dropout", self.dropout, 0 <= self.dropout <= 1, "a probability in [0, 1]"),
            ("--steps", self.steps, self.steps >= 1, "at least 1"),
            ("--lr", self.lr, 0 < self.lr < float("inf"), "a positive number"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("--quantize", self.quantize, self.quantize in (None, "nf4"), "nf4, or no --quantize"),
        ):
            if not ok:
                raise CommandError(f"{option}: got {value}, expected {expected}")
        parse_variant(self.variant, "lora", "dora", "adalora")
        if self.tokens_per_step is not None and self.tokens_per_step < MIN_WINDOW:
            raise CommandError(f"--tokens-per-step: got {self.tokens_per_step}, expected at least {MIN_WINDOW}")
        if self.output.exists() and not self.output.is_dir():
            raise CommandError(f"--output: got {self.output}, which is a file; pass a directory")

    @property
    def window(self) -> int:
        """Tokens of one training sequence."""
        return min(max(MIN_WINDOW, (self.tokens_per_step or CPU_TOKENS) // 4), MAX_WINDOW)

    @property
    def windows(self) -> int:
        """Sequences of one step."""
        return (self.tokens_per_step or CPU_TOKENS) // self.window

    @property
    def lora_config(self) -> LoRAConfig:
        """--variant adalora begins with ranks half as large again; a tenth of the steps before, a quarter after they fall."""
        shared = {"lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": "all-linear"}
        if self.variant != "adalora":
            return LoRAConfig(r=self.rank, use_dora=self.variant == "dora", **shared)  # type: ignore[arg-type]
        schedule = {"tinit": self.steps // 10, "tfinal": self.steps // 4, "total_step": self.steps}
        return AdaLoRAConfig(init_r=(3 * self.rank + 1) // 2, target_r=self.rank, **schedule, **shared)  # type: ignore[arg-type]
