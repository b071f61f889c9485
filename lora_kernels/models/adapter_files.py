"""Read an adapter's files, which PEFT, diffusers, kohya's sd-scripts, ai-toolkit or save_adapter wrote, into a model."""

import contextlib
import os
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from ..layers.adapters import check_adapter_name
from ..layers.linear import DEFAULT_ADAPTER
from . import adapter_config
from .adalora.config import AdaLoRAConfig
from .adalora.files import expanded
from .adapter_keys import MAGNITUDE
from .adapter_loading import LoadedAdapter, Loading, Source, prepare_loading, refuse_unready
from .adapter_saving import CONFIG_FILE, WEIGHTS_FILE, subfolder
from .atomic_files import settle
from .lora_files.keys import PEFT
from .lora_files.loading import read_adapter
from .lora_files.parts import ALONE, parts_of
from .lora_files.reading import opened

LARGEST_CONFIG = 1 << 26  # bytes; AdaLoRA's, with a word for each of a layer's ranks, come to a megabyte


@overload
def load_adapter(  # type: ignore[overload-overlap]
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = ...,
    *,
    autocast_adapter_dtype: bool = ...,
    quantize: str | None = ...,
) -> LoadedAdapter: ...


@overload
def load_adapter(
    model: object,
    path: str | os.PathLike,
    adapter_name: str = ...,
    *,
    autocast_adapter_dtype: bool = ...,
    quantize: str | None = ...,
) -> dict[str, LoadedAdapter]: ...


def load_adapter(
    model: object,
    path: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    autocast_adapter_dtype: bool = True,
    quantize: str | None = None,
) -> LoadedAdapter | dict[str, LoadedAdapter]:
    """Read an adapter of any common format as `adapter_name` of `model`; the LoadedAdapter says what was read, for people too.

    path: a directory that PEFT or save_adapter wrote, of which the subfolder `adapter_name` counts if an adapter is in it; or
        one .safetensors file, or a directory with one. PEFT's, diffusers', kohya's (sd-scripts, LyCORIS' LoCon), ComfyUI's and
        ai-toolkit's are told apart by their keys. Each layer's own rank and alpha count; alpha = r where a file has none. Names
        are those of the model's modules, flattened or not; other codebases' go through diffusers' converters.
    model: an nn.Module; or a diffusers pipeline, or a dict of its parts, {"unet": ..., "text_encoder": ...}, for files with
        adapters of several: then the result is a dict, with the LoadedAdapter of each part that the file has.
    A model that has an adapter of that name gets its values; otherwise the adapter is added, as by add_lora with the file's
    configuration and the same `autocast_adapter_dtype` and `quantize`. Where PEFT's files have the embedding and the head of a
    resized model, the adapter gets frozen copies of them.

    Raises FileNotFoundError or ValueError, before anything changes, for files that are missing, damaged or pickled, a
    configuration that has no counterpart here, LoKr, LoHa, OFT and others that are no LoRA, keys or shapes that are not exactly
    those of this model, and values that are NaN or infinite, or would be in the adapter's dtype; RuntimeError for a model that
    is merged, or whose adapters accelerate offloads.
    """
    check_adapter_name(adapter_name, "adapter_name")
    parts = parts_of(model)
    for part in parts.values():
        refuse_unready(part)
    found = find_adapter(Path(path), adapter_name)
    if not found.is_file() and found.suffix != ".safetensors":
        if ALONE not in parts:
            raise ValueError(f"{found}: PEFT's files are for one model, expected a part such as pipeline.unet")
        prepared = {ALONE: _prepare_peft(parts[ALONE], found, adapter_name, autocast_adapter_dtype)}
    else:
        read = read_adapter(found, parts, model)
        prepared = {
            part: prepare_loading(
                parts[part],
                adapter.config,
                adapter.tensors,
                adapter_name,
                Source(found, found, found, adapter.format, adapter.metadata),
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
            for part, adapter in read.items()
        }
    loaded = {part: loading.load(autocast_adapter_dtype, quantize) for part, loading in prepared.items()}
    return loaded.get(ALONE, loaded)


def find_adapter(path: Path, adapter_name: str = DEFAULT_ADAPTER) -> Path:
    """PEFT's directory, or the one file, that holds the adapter. Raises ValueError for a directory with several."""
    for folder in (subfolder(path, adapter_name), path):
        with contextlib.suppress(PermissionError):
            settle(folder)
        if (folder / CONFIG_FILE).is_file():
            return folder
        files = sorted(file.name for file in folder.glob("*.safetensors")) if folder.is_dir() else []
        if len(files) > 1:
            raise ValueError(f"{folder}: got {files}, expected one of these files")
        if files and files[0] != WEIGHTS_FILE:  # PEFT's has a configuration beside
            return folder / files[0]
    beside = path.name == WEIGHTS_FILE and (path.parent / CONFIG_FILE).is_file()
    return path.parent if beside else path


def _prepare_peft(model: nn.Module, folder: Path, adapter_name: str, autocast_adapter_dtype: bool) -> Loading:
    """PEFT's two files, which fit `model`."""
    values, saved = read_peft(folder)
    saved = {key.removesuffix(".weight") if key.endswith(f".{MAGNITUDE}.weight") else key: t for key, t in saved.items()}
    config = adapter_config.from_peft(values, model, str(folder / CONFIG_FILE))
    allocation: dict[str, Tensor] | None = None
    if isinstance(config, AdaLoRAConfig):
        saved, allocation = expanded(saved, values.get("rank_pattern"), config.init_r, str(folder / CONFIG_FILE))
    source = Source(folder, folder / CONFIG_FILE, folder / WEIGHTS_FILE, PEFT, {}, values, allocation)
    return prepare_loading(model, config, saved, adapter_name, source, autocast_adapter_dtype=autocast_adapter_dtype)


def read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors on the CPU) of the adapter in `directory`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
            pickled = "; adapter_model.bin is a pickle, which is not read: save it as safetensors" * (
                "adapter_model.bin" in found
            )
            raise FileNotFoundError(f"{directory}: {name} is missing; found {found}{pickled}")
    config, weights = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    if (size := config.stat().st_size) > LARGEST_CONFIG:
        raise ValueError(f"{config}: got {size} bytes, expected at most {LARGEST_CONFIG}")
    values = adapter_config.parsed(config.read_bytes(), str(config))
    with opened(weights) as file:
        return values, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
