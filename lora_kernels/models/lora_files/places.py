"""Where a file's factors belong in a model: by its own modules' paths, and other codebases' names by way of diffusers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers.kinds import features
from ..names import parents
from ..state import lora_layers
from ..targets import is_linear
from ..wrappers import named_modules
from .factors import Factors, Module
from .foreign_names import Found, renamed
from .keys import KOHYA
from .parts import part_for

CLIP = "text_model"  # which transformers' CLIPTextModel had around its layers, and files have still


class Spot(NamedTuple):
    """A module of a model: the part, and its path there."""

    part: str
    path: str


@dataclass(frozen=True)
class Index:
    """A model's modules with a weight, by path and by kohya's flattened names."""

    modules: Mapping[str, nn.Module]
    flattened: Mapping[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> "Index":
        adapted = lora_layers(model)
        modules = {
            path: module
            for path, module in named_modules(model)
            if isinstance(getattr(module, "weight", None), Tensor) and not any(p in adapted for p in parents(path)[1:])
        }
        flattened: dict[str, list[str]] = {}
        for path in modules:
            flattened.setdefault(flat(path), []).append(path)
        return cls(modules, flattened)

    def find(self, name: str, flattened: bool = False) -> str | None:
        """The path that a name means; None for another codebase's. Raises ValueError where it may be two modules'.

        flattened: it is no path, even where it looks like one.
        """
        if name in self.modules and not flattened:
            return name
        own = flat(name)
        for spelled in (own, own.removeprefix(f"{CLIP}_"), f"{CLIP}_{own}"):
            if paths := self.flattened.get(spelled, ()):
                if len(paths) > 1:
                    raise ValueError(f"{name!r} may be {' or '.join(map(repr, paths))}, which both flatten to {spelled!r}")
                return paths[0]
        return None


def flat(path: str) -> str:
    return path.replace(".", "_")


def placed(file: Mapping[Module, Factors], parts: Mapping[str, nn.Module], pipeline: object) -> dict[str, dict[str, Factors]]:
    """The factors by part and path in it; those of weights that are one in the file and several here are split by rows.

    pipeline: of a class with diffusers' lora_state_dict, or anything. Raises ValueError that names a key for one that no
    module, or the same as another's, is for, or whose shapes are not those of the module's weight.
    """
    indices: dict[str, Index] = {}
    found: dict[Spot, Factors] = {}
    foreign: dict[str, dict[Module, Factors]] = {}
    for module, factors in file.items():
        try:
            part = part_for(module.part, parts)
        except ValueError as error:
            raise ValueError(f"{factors.key!r}: {error}; pass the whole pipeline") from error
        if part not in indices:
            indices[part] = Index.of(parts[part])
        index = indices[part]
        path = _find(index, module, factors.key)
        if path is not None:
            _put(found, Spot(part, path), factors, index)
        else:
            foreign.setdefault(part, {})[module] = factors
    for part, modules in foreign.items():
        for path, factors in _translated(modules, parts[part], indices[part], pipeline):
            _put(found, Spot(part, path), factors, indices[part])
    by_part: dict[str, dict[str, Factors]] = {}
    for spot, factors in found.items():
        by_part.setdefault(spot.part, {})[spot.path] = factors
    return by_part


def _find(index: Index, module: Module, key: str) -> str | None:
    """By the name without the part's prefix or, where that is a module of the model itself, with it."""
    try:
        found = index.find(module.name, module.format == KOHYA)
        return index.find(module.base) if found is None else found
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def _translated(foreign: dict[Module, Factors], model: nn.Module, index: Index, pipeline: object) -> list[tuple[str, Factors]]:
    """The factors under the paths that diffusers gives another codebase's names."""
    spots = renamed(foreign, model, index.find, pipeline)
    placed: list[tuple[str, Factors]] = []
    for module, factors in foreign.items():
        if not (targets := spots.get(module)):
            raise ValueError(_unknown(factors.key, module, model))
        rows = _rows(targets, factors, index)
        placed += [(target.path, factors.rows(index_)) for target, index_ in zip(targets, rows, strict=True)]
    return placed


def _rows(targets: list[Found], factors: Factors, index: Index) -> list[Tensor]:
    """The rows of B for each of `targets`. Where diffusers was asked of a model of another size they follow each other."""
    N = factors.B.shape[0]
    if all(target.asked == N for target in targets):
        return [target.rows for target in targets]
    sizes = [_weight_shape(index.modules[target.path])[0] for target in targets]
    if sum(sizes) != N:
        raise ValueError(
            f"{factors.key!r}: {N} rows beside, expected {' + '.join(map(str, sizes))} for {[t.path for t in targets]}"
        )
    return list(torch.arange(N).split(sizes))


def _put(found: dict[Spot, Factors], spot: Spot, factors: Factors, index: Index) -> None:
    if spot in found:
        raise ValueError(f"{factors.key!r} and {found[spot].key!r} are both for {spot.path}")
    shape, A, B = _weight_shape(index.modules[spot.path]), tuple(factors.A.shape), tuple(factors.B.shape)
    if B[0] != shape[0] or _trimmed(A[1:]) != _trimmed(shape[1:]):
        raise ValueError(
            f"{factors.key!r} is {list(A)}, with {list(B)} beside, for {spot.path} of {list(shape)}, another model's"
        )
    found[spot] = factors


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """[out, in] or [out, in, k, k], however the weight is stored."""
    if is_linear(module):
        return features(module)[::-1]
    return tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the 1 × 1 of a convolution over pixels, which is a linear layer in other models."""
    return shape[:1] if all(size == 1 for size in shape[1:]) else shape


def _unknown(key: str, module: Module, model: nn.Module) -> str:
    return f"{key!r}: no module of {type(model).__name__} is {module.name!r}, and diffusers knows no other name for it"
