"""Write an adapter of a model changed by add_lora: PEFT's adapter_config.json and adapter_model.safetensors, or one file."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import DEFAULT_ADAPTER
from ..layers.offload import with_values
from . import adapter_config
from .adalora.config import AdaLoRAConfig
from .adalora.files import pruned, warn_if_never_allocated
from .adapter_checks import why_not_finite
from .adapter_keys import adapter_tensors
from .atomic_files import all_or_nothing, settle, write_tensors
from .distributed import full, is_sharded
from .embeddings import resized_embeddings
from .lora_files.adapters import factors_of
from .lora_files.factors import Factors
from .lora_files.keys import PEFT
from .lora_files.parts import ALONE, own_name, parts_of
from .lora_files.writing import FORMATS, written
from .state import adapted_layers, lora_state
from .wrappers import unwrapped

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


def save_adapter(model: Any, path: str | os.PathLike, adapter_name: str = DEFAULT_ADAPTER, *, format: str = PEFT) -> Path:
    """Write adapter `adapter_name` of `model` for other tools, and load_adapter, to read: complete or not at all.

    format: "peft", two files in a directory; or one file, "diffusers" for load_lora_weights of its pipelines, or "kohya" with
        flattened names and alphas for ComfyUI, A1111 and their kind. A file goes to `path` itself if that ends in
        .safetensors. In a directory, as in PEFT, "default" is in `path` itself, another adapter in a subfolder of its name.
    model: also a pipeline or a dict of its parts, as in load_adapter, for one file with the adapters of all that have it.

    Returns the directory of PEFT's files, or the file. The header of a file that was loaded (kohya's ss_*) is written again. A
    transformers model that was resized since it was loaded has its embedding and its head in PEFT's file as well. Where
    parameters are sharded (FSDP2), every process has to call it, and the first one writes.
    Raises KeyError for an unknown adapter, and ValueError, before anything is written, for a model without add_lora's layers,
    another format, what the format cannot say (modules trained whole, AdaLoRA: PEFT's alone), and NaN or infinity.
    """
    if format not in (PEFT, *FORMATS):
        raise ValueError(f"format: got {format!r}, expected one of {(PEFT, *FORMATS)}")
    parts = parts_of(model)
    if format != PEFT:
        return _prepare_file(parts, Path(path), adapter_name, format).write()
    if ALONE not in parts:
        raise ValueError(
            f'format: got "peft" for {sorted(parts)}, expected "diffusers" or "kohya", or one of the parts as model'
        )
    return prepare_adapter(parts[ALONE], path, adapter_name).write()


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter's files before they are written: all that can be wrong with its tensors was checked."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # whole ones, on the CPU
    sharded: bool

    def write(self) -> Path:
        if not self.sharded or torch.distributed.get_rank() == 0:
            with all_or_nothing(self.directory) as folder:
                write_tensors(self.tensors, folder / WEIGHTS_FILE, {"format": "pt"})
                text = json.dumps(self.config, indent=2, sort_keys=True) + "\n"
                (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        if self.sharded:
            torch.distributed.barrier()
        return self.directory


def prepare_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str) -> PreparedAdapter:
    """What save_adapter writes, for several adapters to be checked before the first is written; raises as it does."""
    adapted_layers(model)  # says whose layers a model has, if they are not add_lora's
    model = unwrapped(model)
    state = lora_state(model)
    if adapter_name not in state.configs:
        raise KeyError(f"adapter {adapter_name!r}: not found; adapters here: {list(state.configs)}, made by add_lora")
    target = Path(directory) if adapter_name == DEFAULT_ADAPTER else subfolder(directory, adapter_name)
    config = adapter_config.to_peft(model, state.configs[adapter_name], adapter_name)
    own = {**resized_embeddings(model), **adapter_tensors(model, adapter_name)}
    value = with_values(model)  # of adapters that accelerate offloads
    values = {key: value(tensor) for key, tensor in own.items()}
    if any(tensor.is_meta for tensor in values.values()):
        raise ValueError(f"adapter {adapter_name!r}: it is on the meta device and has no values; fill it first")
    whole = {key: full(tensor).detach().to("cpu", copy=True).contiguous() for key, tensor in values.items()}
    diverged = [why for key, t in own.items() if isinstance(t, nn.Parameter) for why in why_not_finite(key, whole[key])]
    if diverged:
        raise ValueError(
            f"adapter {adapter_name!r}: nothing was written, {len(diverged)} of its tensors are lost: {diverged[0]}"
        )
    warn_if_never_allocated(state, adapter_name, whole)
    if isinstance(state.configs[adapter_name], AdaLoRAConfig):
        whole, config["rank_pattern"] = pruned(whole, state.allocations.get(adapter_name, {}))
    sharded = any(is_sharded(tensor) for tensor in own.values())
    return PreparedAdapter(target, config, whole, sharded)


@dataclass(frozen=True)
class PreparedFile:
    """One file of an adapter before it is written."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, str]
    sharded: bool

    def write(self) -> Path:
        if not self.sharded or torch.distributed.get_rank() == 0:
            with all_or_nothing(self.path.parent) as folder:
                write_tensors(self.tensors, folder / self.path.name, self.header)
        if self.sharded:
            torch.distributed.barrier()
        return self.path


def _prepare_file(parts: Mapping[str, nn.Module], path: Path, adapter_name: str, format: str) -> PreparedFile:
    """The adapters of that name of all parts, for one file."""
    having = {name: part for name, part in parts.items() if adapter_name in lora_state(part).configs} or parts
    factors: dict[str, dict[str, Factors]] = {}
    models: dict[str, nn.Module] = {}
    metadata: dict[str, str] = {}
    sharded = False
    for name, part in having.items():
        prepared = prepare_adapter(part, path, adapter_name)
        own = factors_of(unwrapped(part), adapter_name, prepared.tensors)
        called = own_name(name, part, own)
        factors[called], models[called] = own, unwrapped(part)
        metadata |= lora_state(part).metadata.get(adapter_name, {})
        sharded |= prepared.sharded
    single = path.suffix == ".safetensors"
    file = path if single else (path if adapter_name == DEFAULT_ADAPTER else subfolder(path, adapter_name)) / FILE
    tensors, header = written(factors, format, metadata, models)
    return PreparedFile(file, tensors, header, sharded)


def remove_adapter(directory: Path) -> None:
    """Remove the files of an adapter that was saved into `directory` before, and no others."""
    settle(directory)  # or a save that was killed would bring it back
    for name in (CONFIG_FILE, WEIGHTS_FILE):  # first the one that makes readers look for the other
        (directory / name).unlink(missing_ok=True)


def subfolder(directory: str | os.PathLike, adapter_name: str) -> Path:
    """Where an adapter that is not "default" lies. Raises ValueError for a name that is a path out of `directory`,
    or that has not a folder of its own: "a/" and "a" are one path, and the second adapter would replace the first.
    """
    folder = Path(directory) / adapter_name
    if not folder.is_relative_to(directory):
        raise ValueError(f"adapter_name: got {adapter_name!r}, which is no folder inside {os.fspath(directory)!r}")
    if "\0" in adapter_name or Path(adapter_name).as_posix() != adapter_name:
        raise ValueError(
            f"adapter_name: got {adapter_name!r}, which is no name of a folder: expected one without null bytes, and without "
            "empty parts around a /"
        )
    return folder
