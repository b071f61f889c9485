"""Parts of a LoRAConfig that mean nothing in a model: a misspelt name would otherwise leave out, in silence, what it is for."""

import difflib
import warnings
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .config import ALL_LINEAR, LoRAConfig
from .fused import fused_weights
from .names import Patterns, layer_index, names_match, numbered, tails, trained_whole
from .targets import Plan, is_linear
from .tasks import HEADS
from .wrappers import named_modules, unwrapped

NAMED = 5  # parts of a field that are named one by one


@dataclass(frozen=True)
class Parts:
    """What one field of a config has, and what it can mean: `paths` of modules of a `kind`, or `fused` weights.

    found: the parts that mean one of some paths; it may give others, too.
    """

    field: str
    parts: Collection[Any]
    found: Callable[[Collection[str]], Container[Any]]
    paths: Collection[str]
    kind: str
    fused: Collection[str] = ()
    around: Collection[str] = ()  # modules of other kinds: a name is easily thought to stand for what is inside

    def lost(self) -> list[Any]:
        found = self.found([*self.paths, *self.fused])
        return [part for part in self.parts if part not in found]

    def near(self, part: Any) -> str:
        """The names most like a part, or if there are none those that could be."""
        if part in self.found(self.around):
            return f"it is a module around others, which a regex such as {f'.*{part}.*'!r} means"
        text = str(part).rpartition("\\.")[2]  # of a regex, what is behind the last point
        names = sorted(self.paths if "." in text else {path.rpartition(".")[2] for path in self.paths})
        near = difflib.get_close_matches(text, names, cutoff=0.5)
        fused = sorted({path.rpartition(".")[2] for path in self.fused})
        parameters = f"; parameters that are no linear layers: {fused}" * bool(fused)
        return (f"near names: {near}" if near else f"{self.kind}s here: {names[:20]}") + parameters


def check_parts(model: nn.Module, config: LoRAConfig, plan: Plan) -> None:
    """Warn of each name, pattern or layer number that means nothing in `model`, with near names.

    Raises ValueError where that is so for everything that a field has.
    """
    errors: list[str] = []
    doubts: list[str] = []
    for field in _fields(model, config, plan):
        lost = field.lost()
        messages = errors if lost and len(lost) == len(field.parts) else doubts
        place = f"{field.kind} of {type(unwrapped(model)).__name__}"
        if more := lost[NAMED:]:  # to look for near names takes as long as everything else, for each of them
            messages.append(f"{field.field}: {len(more)} more match no {place}, such as {more[:NAMED]}")
        for part in lost[:NAMED]:
            messages.append(f"{field.field}: {part!r} matches no {place}; {field.near(part)}")
    if errors:
        raise ValueError("; ".join(errors))
    for message in doubts:
        warnings.warn(message, stacklevel=3)


def _fields(model: nn.Module, config: LoRAConfig, plan: Plan) -> Iterator[Parts]:
    modules = dict(named_modules(model))
    linear = {path for path, module in modules.items() if is_linear(module)} | {*plan.skipped, *plan.modules}
    fused = {f"{path}.{name}" for path, module in modules.items() for name in fused_weights(module)}
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and value != ALL_LINEAR:
            yield Parts(name, [value], partial(_of_regex, value), linear, "linear layer", fused)
        elif not isinstance(value, str):
            yield Parts(name, value or (), _all_tails, linear, "linear layer", fused, modules)
    layers, adapted = config.layers_to_transform, plan.modules
    numbers = [layers] if isinstance(layers, int) else layers or ()
    of_layers = partial(_layer_numbers, config.layers_pattern)
    yield Parts("layers_to_transform", numbers, of_layers, adapted, "adapted layer")
    before = config.layers_pattern or ()
    before = [before] if isinstance(before, str) else before
    yield Parts("layers_pattern", before, partial(_of_patterns, before), numbered(linear), "numbered module")
    for name in ("rank_pattern", "alpha_pattern"):
        yield Parts(name, value := getattr(config, name), partial(_of_patterns, value), adapted, "adapted layer")
    inside = [path for path in modules if path]
    heads = HEADS.get(config.task_type or "", [])  # all of which PEFT writes into a config: a model has one of them
    there = heads if any(trained_whole(path, heads) for path in inside) else []
    whole = [name for name in config.modules_to_save or () if name not in there]
    yield Parts("modules_to_save", whole, partial(_of_ends, whole), inside, "module")


def _of_regex(regex: str, paths: Collection[str]) -> list[str]:
    return [regex] if any(names_match(path, regex) for path in paths) else []


def _all_tails(paths: Collection[str]) -> set[str]:
    return {tail for path in paths for tail in tails(path)}


def _layer_numbers(pattern: list[str] | str | None, paths: Collection[str]) -> set[int | None]:
    return {layer_index(path, pattern) for path in paths}


def _of_patterns(patterns: Collection[str], paths: Collection[str]) -> set[str]:
    asked = Patterns(patterns)
    return {pattern for path in paths for pattern in asked.matching(path)}


def _of_ends(names: Collection[str], paths: Collection[str]) -> list[str]:
    return [name for name in names if any(trained_whole(path, [name]) for path in paths)]
