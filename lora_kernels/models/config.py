"""LoRAConfig, with PEFT's field names."""

import re
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..layers.adapters import check_dora, check_integer, check_lora_alpha, scaling
from ..layers.lora_experts import check_stacks
from ..mask import check_p
from .names import Patterns, layer_index, layer_regex, names_match, pattern_regex

ALL_LINEAR = "all-linear"
NAMES = {  # fields with names -> what they take
    **dict.fromkeys(("target_modules", "exclude_modules"), "a list of names or a regex"),
    **dict.fromkeys(("layers_pattern", "modules_to_save", "target_parameters"), "a list of names"),
}
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # peft.TaskType


class Rank(NamedTuple):
    """What rank_pattern and alpha_pattern, or the general values, say of one layer."""

    r: int
    lora_alpha: float
    scaling: float


@dataclass
class LoRAConfig:
    """What `add_lora` adds, in PEFT's words (peft.LoraConfig has more fields; the ones here mean the same, but for
    "all-linear", the default here, which leaves out a head called lm_head, score or classifier in any model).

    r, lora_alpha: rank and α of every layer, unless `rank_pattern` / `alpha_pattern` ({name or regex: value}, matched
        against the end of a module's path) say otherwise. The low-rank term is scaled by α/r, or α/√r with `use_rslora`.
    lora_dropout: probability with which the adapter's input is dropped in training mode.
    target_modules: a list of names (a path equal to one, or ending in ".name"), a regex that must match the whole path, or
        "all-linear": every linear layer but the output head. The default is "all-linear", or with target_parameters none.
    target_parameters: names of experts' stacks of weights (a path equal to one, or ending in ".name"), such as
        "experts.gate_up_proj" and "experts.down_proj", each of whose experts gets an A and a B of its own; with lora_dropout
        too, but without lora_bias and use_dora.
    layers_to_transform: the numbers, or number, of the layers to which a list of target_modules is limited; the number is the
        first one behind two names ("model.layers.3."), or behind `layers_pattern` ("layers", or several names).
    exclude_modules: names or a regex, as for target_modules, that are left alone.
    init_lora_weights: see LoRALinear.
    lora_bias: give each adapter a bias of its own, scaled with it.
    use_dora: give each adapter a magnitude (DoRA, Liu et al. 2024), see LoRALinear; without lora_bias.
    bias: which biases are trained: "none", "lora_only" (those of the adapted layers) or "all".
    modules_to_save: modules to train whole, in a copy beside the adapters, such as a new classifier head: each path that ends
        in one of these names, which as in PEFT may begin inside a word: "norm" means "input_layernorm" too.
    task_type: what the model is for, a value of peft.TaskType. As in PEFT, "SEQ_CLS" and "TOKEN_CLS" train the modules named
        "classifier" or "score", and "QUESTION_ANS" "qa_outputs", as modules_to_save. By default nothing of that; save_adapter
        then writes the task of a transformers model's class, from which AutoPeftModelForCausalLM and others go, unless that
        task has a head which modules_to_save does not name.

    Names may come in any collection, and are kept as a list: JSON, in which an adapter's configuration is saved, has no sets.
    Raises ValueError or TypeError at once for a value outside its range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        for name, expected in NAMES.items():
            setattr(self, name, _as_list(name, getattr(self, name), str, expected))
        self.layers_to_transform = _as_list("layers_to_transform", self.layers_to_transform, int, "layer numbers")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected {{name or regex: value}}")
            for pattern in getattr(self, name):
                _check_regex(name, pattern, pattern_regex(pattern))
        for name, r in {"r": self.r, **_entries("rank_pattern", self.rank_pattern)}.items():
            check_integer(r, name, 1)
        for name, alpha in {"lora_alpha": self.lora_alpha, **_entries("alpha_pattern", self.alpha_pattern)}.items():
            check_lora_alpha(alpha, name)
        check_p(self.lora_dropout, "lora_dropout")
        for name in ("use_rslora", "lora_bias", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        if self.use_dora:
            check_dora(lora_bias=self.lora_bias)
        if not isinstance(self.init_lora_weights, (bool, str)):
            raise TypeError(f"init_lora_weights: got {self.init_lora_weights!r}, expected True, False or a method's name")
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias: got {self.bias!r}, expected 'none', 'lora_only' or 'all'")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                _check_regex(name, value, value, "a list of names or a valid regex")
        if self.target_modules is None:
            self.target_modules = [] if self.target_parameters else ALL_LINEAR
        if self.target_parameters:
            check_stacks(self.target_parameters, self.init_lora_weights, lora_bias=self.lora_bias, use_dora=self.use_dora)
        elif not self.target_modules:
            raise ValueError(f"target_modules: got {self.target_modules!r}, expected names, a regex or {ALL_LINEAR!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform: got {self.layers_to_transform!r} with target_modules {self.target_modules!r}, expected "
                "a list of names there; a regex can name the layers itself"
            )
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            _check_regex("layers_pattern", pattern, layer_regex(pattern))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern: got {self.layers_pattern!r} without layers_to_transform, which it is for")
        if self.task_type is not None:
            if self.task_type not in TASK_TYPES:
                raise ValueError(f"task_type: got {self.task_type!r}, expected one of {', '.join(TASK_TYPES)}, or None")
            self.task_type = TASK_TYPES[TASK_TYPES.index(self.task_type)]  # a plain string, also for a peft.TaskType
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save: got {self.modules_to_save!r}, expected a list of names")

    def targets(self, path: str) -> bool:
        """Whether target_modules, as names or a regex, and layers_to_transform mean the module at `path`."""
        if not names_match(path, self.target_modules):
            return False
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        return not layers or path in (self.target_modules or ()) or layer_index(path, self.layers_pattern) in layers

    def ranks(self, paths: Iterable[str]) -> dict[str, Rank]:
        """For the module at each path what the first pattern that matches says, or else the general values.

        Of all paths at once: the patterns are prepared for that, which for each path would cost as much as all of them.
        """
        of_rank, of_alpha = Patterns(self.rank_pattern), Patterns(self.alpha_pattern)
        found: dict[str, Rank] = {}
        for path in paths:
            r = next((self.rank_pattern[key] for key in of_rank.matching(path)), self.r)
            alpha = next((self.alpha_pattern[key] for key in of_alpha.matching(path)), self.lora_alpha)
            found[path] = Rank(r, alpha, scaling(r, alpha, self.use_rslora))
        return found


def _entries(name: str, pattern: dict[str, Any]) -> dict[str, Any]:
    """A pattern's values by how an error names them."""
    return {f"{name}[{key!r}]": value for key, value in pattern.items()}


def _as_list(name: str, value: Any, kind: type, expected: str) -> Any:
    """A collection as a list, and one `kind` or None as it is. Raises TypeError for anything else."""
    if isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping)):
        value = sorted(value, key=repr) if isinstance(value, Set) else list(value)  # a set's order is another in each process
    several = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, kind) and not isinstance(each, bool) for each in several):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    return value


def _check_regex(name: str, got: Any, regex: str, expected: str = "a name or a valid regex") -> None:
    """Raise ValueError if `regex`, which is made of what field `name` got, is none."""
    try:
        re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:  # too deep; a{9999999999}
        raise ValueError(f"{name}: got {got!r}, expected {expected}: {error}") from None
