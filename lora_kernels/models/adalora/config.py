"""AdaLoRAConfig, with PEFT's field names and defaults; and where a model's AdaLoRA adapter is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import nn

from ...layers.adapters import AdaptedWeight, check_adalora, check_integer, scaling
from ..config import LoRAConfig, Rank
from ..state import adapted_layers, lora_state
from ..switching import active_adapter


@dataclass
class AdaLoRAConfig(LoRAConfig):
    """y = x·Wᵀ + s·drop(x)·(E ⊙ A)ᵀ·Bᵀ + c, s = lora_alpha / (init_r + 1e-5): what `add_lora` adds for AdaLoRA (Zhang 2023).

    The fields of peft.AdaLoraConfig. Every layer begins with init_r singular values E; RankAllocator sets those of the least
    important triplets (A's row, E, B's column) to zero, until target_r are left on average.
    tinit, tfinal, total_step: until step tinit all stay; from there to step total_step − tfinal their number falls by a cubic;
        then the ranks are final. deltaT: steps between two decisions on the way.
    beta1, beta2: decay of the running means of a triplet's importance and of its uncertainty.
    orth_reg_weight: the factor in orthogonality_loss.
    total_step may be None, which PEFT's files may not, and target_r above init_r, for a model that no RankAllocator trains.

    LoRAConfig's other fields mean the same, but for r, rank_pattern, alpha_pattern, use_rslora, lora_bias and use_dora, which
    AdaLoRA has not, and init_lora_weights, which is True (A and B normal, E zero) or False. Raises ValueError for a value
    outside its range.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        lacking = ("use_rslora", "lora_bias", "use_dora", "init_lora_weights")
        check_adalora(**{name: getattr(self, name) for name in lacking})
        if self.r != LoRAConfig.r:
            raise ValueError(f"r: got {self.r}, expected none: AdaLoRA begins with init_r and ends with target_r on average")
        if self.target_parameters:
            raise ValueError(f"target_parameters: got {self.target_parameters!r}, expected None: AdaLoRA, as PEFT's, has none")
        for name in ("rank_pattern", "alpha_pattern"):
            if value := getattr(self, name):
                raise ValueError(f"{name}: got {value!r}, expected {{}}: AdaLoRA's ranks are RankAllocator's, its α is one")
        for name, least in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            check_integer(getattr(self, name), name, least)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a number between 0 and 1")
        weight = self.orth_reg_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"orth_reg_weight: got {weight!r}, expected a finite number of at least 0")
        if self.total_step is not None:
            check_integer(self.total_step, "total_step", 1)
            if self.tinit >= self.total_step - self.tfinal:
                raise ValueError(
                    f"tinit: got {self.tinit}, expected less than total_step − tfinal = {self.total_step - self.tfinal}, so "
                    "that there are steps between them to decide on ranks; lower tinit or tfinal, or raise total_step"
                )

    def ranks(self, paths: Iterable[str]) -> dict[str, Rank]:
        """init_r singular values, of which some are zero, and one scaling, for all."""
        rank = Rank(self.init_r, self.lora_alpha, scaling(self.init_r, self.lora_alpha, use_adalora=True))
        return dict.fromkeys(paths, rank)

    def plain(self) -> LoRAConfig:
        """The LoRAConfig with the fields that both have."""
        return LoRAConfig(**{field.name: getattr(self, field.name) for field in fields(LoRAConfig)})


def active_adalora(model: nn.Module) -> tuple[str, AdaLoRAConfig, dict[str, AdaptedWeight]]:
    """(name, configuration, layers by path) of the active adapter. Raises ValueError if it is not an AdaLoRA one."""
    layers, name = adapted_layers(model), active_adapter(model)
    configs = lora_state(model).configs
    config = configs.get(name or "")
    if name is None or not isinstance(config, AdaLoRAConfig):
        found = [adapter for adapter, own in configs.items() if isinstance(own, AdaLoRAConfig)]
        cure = f"call set_adapter(model, {found[0]!r})" if found else "call add_lora(model, AdaLoRAConfig(…))"
        raise ValueError(f"model: its active adapter is {name!r}, expected one of AdaLoRA; {cure} first")
    return name, config, {path: layer for path, layer in layers.items() if name in layer.adapters}  # type: ignore[misc]
