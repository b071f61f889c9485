"""Adapters' files for the commands, and the modules of a model from its configuration alone: no weights are read."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models.conversion import read_parts, write_parts
from ..models.lora_files.keys import PEFT
from ..models.lora_files.parts import ALONE
from ..models.lora_files.writing import FORMATS, Parts
from .console import CommandError, Output, first_line, require

LIBRARIES = ("diffusers", "transformers")
ADAPTED = ("unet", "transformer", "text_encoder")  # how the names of a pipeline's parts begin that adapters are for


def check_target(target: Path, format: str) -> None:
    """Raise CommandError for another format, or a path that is none for it."""
    if format not in (PEFT, *FORMATS):
        raise CommandError(f"--format: got {format!r}, expected {', '.join((PEFT, *FORMATS))}")
    if (target.suffix == ".safetensors") == (format == PEFT):
        expected = "a directory" if format == PEFT else "a path that ends in .safetensors"
        raise CommandError(f"{target}: expected {expected} for --format {format}")


def read(source: Path, models: Mapping[str, nn.Module] | None) -> tuple[Parts, dict[str, str]]:
    """The adapter of a file. Raises CommandError for what cannot be read."""
    with refusing("; pass --model DIR, a pipeline or model that save_pretrained wrote" * (models is None)):
        return read_parts(source, models)


def write(
    out: Output,
    parts: Parts,
    target: Path,
    format: str,
    metadata: Mapping[str, str],
    models: Mapping[str, nn.Module] | None,
) -> None:
    """Write a file and say so. Raises CommandError for what the format cannot hold."""
    with refusing():
        place = write_parts(parts, target, format, metadata, models)
    counts = ", ".join(f"{len(factors)} layers of the {part}" for part, factors in parts.items())
    out.print(f"{place}: {format}, {counts}", markup=False, soft_wrap=True)
    ranks = {part: {path: each.r for path, each in factors.items()} for part, factors in parts.items()}
    out.write_json({"output": str(place), "format": format, "ranks": ranks})


@contextlib.contextmanager
def refusing(cure: str = "") -> Iterator[None]:
    """What is wrong with a file, as the command's line."""
    try:
        yield
    except (FileNotFoundError, KeyError, ValueError) as error:
        name = cure if "whose meaning" in str(error) else ""
        raise CommandError(f"{first_line(error)}{name}") from error


def models_of(directory: Path) -> dict[str, nn.Module]:
    """The parts of a pipeline, or a model alone, of their configurations in `directory`, on the meta device."""
    index = directory / "model_index.json"
    if index.is_file():
        parts = {name: value for name, value in _json(index).items() if name.startswith(ADAPTED)}
        return {name: _model(directory / name, name) for name in parts if (directory / name / "config.json").is_file()}
    return {ALONE: _model(directory, "--model")}


def _model(directory: Path, what: str) -> nn.Module:
    config = _json(directory / "config.json")
    diffusers = "_class_name" in config
    (library,) = require(LIBRARIES[0] if diffusers else LIBRARIES[1])
    names = [config["_class_name"]] if diffusers else config.get("architectures") or [None]
    base: Any = library.ModelMixin if diffusers else library.PreTrainedModel
    kind: Any = getattr(library, names[0], None) if isinstance(names[0], str) else None
    if not callable(kind) or not issubclass(kind, base):
        raise CommandError(f"{what}: {directory} is a {names[0]!r}, expected a model of {library.__name__}")
    try:
        with torch.device("meta"):
            if diffusers:
                return kind.from_config(config)
            return kind(kind.config_class.from_pretrained(directory, local_files_only=True))
    except Exception as error:  # of a configuration: whatever the constructor raises
        raise CommandError(f"{what}: cannot make {names[0]} from {directory}: {first_line(error)}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CommandError(f"--model: cannot read {path}: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CommandError(f"--model: {path} has a {type(values).__name__}, expected an object")
    return values
