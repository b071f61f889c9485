"""Parts of a LoRAConfig that mean nothing in a model: a misspelt name would otherwise leave out, in silence, what it is for."""

import difflib
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import ALL_LINEAR, LoRAConfig
from .fused import fused_weights
from .names import layer_index, names_match, pattern_matches, trained_whole
from .targets import is_linear, plan_layers
from .tasks import HEADS
from .wrappers import named_modules, unwrapped


@dataclass(frozen=True)
class Parts:
    """What one field of a config has, and what it can mean: `paths` of modules of a `kind`, or `fused` weights."""

    field: str
    parts: Collection[Any]
    matches: Callable[[Any, str], bool]
    paths: Collection[str]
    kind: str
    fused: Collection[str] = ()
    around: Collection[str] = ()  # modules of other kinds: a name is easily thought to stand for what is inside

    def lost(self) -> list[Any]:
        paths = [*self.paths, *self.fused]
        return [part for part in self.parts if not any(self.matches(part, path) for path in paths)]

    def near(self, part: Any) -> str:
        """The names most like a part, or if there are none those that could be."""
        if any(self.matches(part, path) for path in self.around):
            return f"it is a module around others, which a regex such as {f'.*{part}.*'!r} means"
        text = str(part).rpartition("\\.")[2]  # of a regex, what is behind the last point
        names = sorted(self.paths if "." in text else {path.rpartition(".")[2] for path in self.paths})
        near = difflib.get_close_matches(text, names, cutoff=0.5)
        fused = sorted({path.rpartition(".")[2] for path in self.fused})
        parameters = f"; parameters that are no linear layers: {fused}" * bool(fused)
        return (f"near names: {near}" if near else f"{self.kind}s here: {names[:20]}") + parameters


def check_parts(model: nn.Module, config: LoRAConfig, adapter_name: str) -> None:
    """Warn of each name, pattern or layer number that means nothing in `model`, with near names.

    Raises ValueError where that is so for everything that a field has, and as plan_layers.
    """
    errors: list[str] = []
    doubts: list[str] = []
    for field in _fields(model, config, *plan_layers(model, config, adapter_name)):
        lost = field.lost()
        messages = errors if lost and len(lost) == len(field.parts) else doubts
        for part in lost:
            place = f"{field.kind} of {type(unwrapped(model)).__name__}"
            messages.append(f"{field.field}: {part!r} matches no {place}; {field.near(part)}")
    if errors:
        raise ValueError("; ".join(errors))
    for message in doubts:
        warnings.warn(message, stacklevel=3)


def _fields(model: nn.Module, config: LoRAConfig, plan: Collection[str], skipped: Collection[str]) -> Iterator[Parts]:
    modules = dict(named_modules(model))
    linear = {path for path, module in modules.items() if is_linear(module)} | {*skipped}
    fused = {f"{path}.{name}" for path, module in modules.items() for name in fused_weights(module)}
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and value != ALL_LINEAR:
            yield Parts(name, [value], lambda regex, path: names_match(path, regex), linear, "linear layer", fused)
        elif not isinstance(value, str):
            yield Parts(name, value or (), lambda name, path: names_match(path, [name]), linear, "linear layer", fused, modules)
    layers = config.layers_to_transform
    numbers = [layers] if isinstance(layers, int) else layers or ()
    yield Parts(
        "layers_to_transform", numbers, lambda n, path: layer_index(path, config.layers_pattern) == n, plan, "adapted layer"
    )
    for name in ("rank_pattern", "alpha_pattern"):
        yield Parts(name, getattr(config, name), pattern_matches, plan, "adapted layer")
    inside = [path for path in modules if path]
    heads = HEADS.get(config.task_type or "", [])  # all of which PEFT writes into a config: a model has one of them
    there = heads if any(trained_whole(path, heads) for path in inside) else []
    saved = [name for name in config.modules_to_save or () if name not in there]
    yield Parts("modules_to_save", saved, lambda name, path: trained_whole(path, [name]), inside, "module")
