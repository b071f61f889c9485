"""Adapters from file to file, of any formats: as factors by part and path between."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from . import adapter_config
from .adapter_files import find_adapter, read_peft
from .adapter_saving import PreparedAdapter, PreparedFile
from .lora_files.adapters import config_of, rescaled, tensors_of
from .lora_files.factors import check_values, modules_of
from .lora_files.keys import DIFFUSERS, PEFT
from .lora_files.loading import LoRAFile, configured, factors_by_part, read_lora_file
from .lora_files.parts import own_name
from .lora_files.writing import Parts, written


def read_parts(path: Path, models: Mapping[str, nn.Module] | None = None) -> tuple[Parts, dict[str, str]]:
    """(factors by a pipeline's name of the part and path, strings of the header) of a file, or of PEFT's directory.

    models: whose modules the names are of, on the meta device too; without them they have to be paths, as PEFT and diffusers
    write them. Raises FileNotFoundError or ValueError that names the file.
    """
    found = find_adapter(path)
    file = _peft(found) if found.is_dir() else read_lora_file(found)
    if models is not None:
        placed = factors_by_part(found, file, models, None)
        return {own_name(part, models[part], factors): factors for part, factors in placed.items()}, file.metadata
    check_values(found, file.tensors)
    by_part: dict[str, dict] = {}
    for module, factors in file.modules.items():
        if module.format not in (PEFT, DIFFUSERS):
            raise ValueError(f"{found}: {factors.key!r} is a name of {module.format}'s, whose meaning a model's modules say")
        by_part.setdefault(module.part, {})[module.name] = factors
    named = {own_name(part, None, factors): factors for part, factors in by_part.items()}
    try:
        return {part: configured(file, part, nn.Module(), factors) for part, factors in named.items()}, file.metadata
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from error


def write_parts(
    parts: Parts, target: Path, format: str, metadata: Mapping[str, str], models: Mapping[str, nn.Module] | None = None
) -> Path:
    """Write factors as save_adapter does, to the file `target`, or for "peft" to that directory; complete or not at all.

    Raises ValueError for what the format cannot hold.
    """
    if format != PEFT:
        here = {own_name(part, model, parts.get(part, ())): model for part, model in (models or {}).items()}
        tensors, header = written(parts, format, metadata, here)
        return PreparedFile(target, tensors, header, False).write()
    if len(parts) > 1:
        raise ValueError(f"{target}: PEFT's files are for one model, got {sorted(parts)}; expected another format")
    ((_, factors),) = parts.items()
    config = {"peft_type": "LORA", "inference_mode": True, **dataclasses.asdict(config_of(factors, list(factors)))}
    return PreparedAdapter(target, config, tensors_of(factors), False).write()


def _peft(folder: Path) -> LoRAFile:
    """PEFT's two files, with their scalings as alphas."""
    values, tensors = read_peft(folder)
    config = adapter_config.from_peft(values, nn.Module(), str(folder))
    try:
        modules = modules_of(tensors)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    by_name = {module.name: factors for module, factors in modules.items()}
    scaled = rescaled(by_name, config)
    return LoRAFile(PEFT, {module: scaled[module.name] for module in modules}, {}, tensors)
