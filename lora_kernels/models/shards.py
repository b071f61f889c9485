"""A state dict in safetensors files of limited size, under transformers' names."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from .atomic_files import write_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
SHARD_FILE = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_size: int) -> list[str]:
    """Write model.safetensors, or shards of at most `max_shard_size` bytes and then their index; the files' names.

    A tensor is asked for when those before it are gathered or written; one that is larger than a shard has a file of its own.
    """
    written: list[dict[str, int]] = []  # of each file, the bytes of its tensors
    shard: dict[str, Tensor] = {}
    size, storages = 0, set[int]()  # of the shard
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_size:
            written.append(_write(shard, _unnamed(folder, len(written))))
            shard, size, storages = {}, 0, set()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # it may overlap with one of the shard, which save_file refuses
        shard[name] = tensor
        size += tensor.nbytes
        storages.add(tensor.untyped_storage().data_ptr())
    written.append(_write(shard, _unnamed(folder, len(written))))
    return _name(written, folder)


def remove_shards(directory: Path, keep: list[str]) -> None:
    """Remove what write_shards wrote to `directory` at another time: a reader would take the wrong one of two models."""
    for path in directory.iterdir():
        ours = path.name in (WEIGHTS_FILE, INDEX_FILE) or SHARD_FILE.fullmatch(path.name)
        if ours and path.name not in keep:
            path.unlink()


def _write(shard: dict[str, Tensor], path: Path) -> dict[str, int]:
    write_tensors(shard, path, {"format": "pt"})
    return {name: tensor.nbytes for name, tensor in shard.items()}


def _unnamed(folder: Path, index: int) -> Path:
    """Where a shard lies until the number of shards, a part of its name, is known."""
    return folder / f"shard-{index}"


def _name(written: list[dict[str, int]], folder: Path) -> list[str]:
    """Give the shards their names and write their index, if there are several; the files' names."""
    count = len(written)
    names = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        _unnamed(folder, i).rename(folder / name)
    if count == 1:
        return names
    weight_map = {tensor: name for name, sizes in zip(names, written, strict=True) for tensor in sizes}
    index = {"metadata": {"total_size": sum(sum(sizes.values()) for sizes in written)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*names, INDEX_FILE]
