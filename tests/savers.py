"""Whatever the package writes for others to read, each as (write a version, read what is there), for faults to be injected."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter, save_merged
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.demo.report import plot
from lora_kernels.commands.tune import run as tune
from lora_kernels.models.atomic_files import settle
from lora_kernels.models.conversion import read_parts, write_parts

FILE, INDEX = "lora.safetensors", "model.safetensors.index.json"


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))


@cache
def adapted(version: int, config: int) -> nn.Module:
    """The base with an adapter of that version's values, and of that configuration."""
    model = base()
    options = {"r": 2 + config, "lora_alpha": 4 + 8 * config}
    add_lora(model, LoRAConfig(target_modules="all-linear", init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.fill_(0.25 + version)
    return model


def values(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    return {name: t.tolist() for name, t in sorted(tensors.items())}


def function(path: Path) -> tuple[float, dict[str, list]]:
    """(α/r, tensors) of the adapter there, as load_adapter reads it."""
    model = base()
    found = load_adapter(model, path)
    return found.config.lora_alpha / found.config.r, values(model.state_dict())


def read_by_others(folder: Path) -> tuple[float, dict[str, list]]:
    """(α/r, tensors) of PEFT's two files as they are, without load_adapter's second look."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"], values(load_file(folder / "adapter_model.safetensors"))


def merge(folder: Path, version: int, shard: int) -> None:
    save_merged(adapted(version, 0), folder, max_shard_size=shard)


def read_shards(folder: Path, first: Callable[[Path], None] = lambda _: None) -> dict[str, list]:
    first(folder)
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(names.values())) > 1
    return values({name: load_file(folder / file)[name] for name, file in names.items()})


def convert(folder: Path, version: int, source: Path) -> None:
    if not (source / str(version)).is_dir():
        save_adapter(adapted(version, version), source / str(version))
    parts, metadata = read_parts(source / str(version))
    write_parts(parts, folder / FILE, "kohya", metadata, {"unet": base()})


def checkpoint(folder: Path, version: int) -> None:
    """What Trainer calls for each checkpoint. Of transformers a name suffices, which takes ten seconds to import."""
    sys.modules.setdefault("transformers.trainer", SimpleNamespace(TRAINING_ARGS_NAME="training_args.bin"))
    from lora_kernels.integrations.checkpoints import AdapterCheckpoints

    trainer = SimpleNamespace(args=[version], model=adapted(version, 0), processing_class=None, data_collator=None)
    AdapterCheckpoints._save(trainer, str(folder))


def read_checkpoint(folder: Path) -> tuple[Any, list[int]]:
    return read_by_others(folder), torch.load(folder / "training_args.bin", weights_only=True)


def draw(folder: Path, version: int) -> None:
    plot([4.0, 3.0 - version, 2.0, 1.0], {0: 4.0, 4: 1.0}, folder / "loss.png")


@dataclass(frozen=True)
class Saver:
    """write(folder, version), and read(folder) as this package does, which finishes what a killed save had completed.

    others: how other programs read, which find an old version, a new one, or FileNotFoundError. one_by_one: no file describes
    others, and each is an old one or a new one. every: of its operations one in so many is tried: a picture takes 0.3 s.
    """

    write: Callable[[Path, int], object]
    read: Callable[[Path], Any]
    others: Callable[[Path], Any] | None = None
    one_by_one: bool = False
    every: int = 1


def savers(scratch: Path) -> dict[str, Saver]:
    """scratch: a folder for what comes before a save, in which nothing fails."""

    def adapter(config: int, file: str = "", **options: Any) -> Callable[[Path, int], object]:
        return lambda folder, version: save_adapter(adapted(version, config * version), folder / file, **options)

    def text(file: str) -> Callable[[Path], str]:
        return lambda folder: (folder / file).read_text()

    def file(folder: Path) -> Any:
        return function(folder / FILE)

    return {
        "adapter": Saver(adapter(1), function, read_by_others),
        "adapter, same configuration": Saver(adapter(0), read_by_others, one_by_one=True),
        "diffusers": Saver(adapter(1, FILE, format="diffusers"), file),
        "kohya": Saver(adapter(1, FILE, format="kohya"), file),
        "convert": Saver(partial(convert, source=scratch), file),
        "checkpoint": Saver(checkpoint, read_checkpoint, one_by_one=True),
        "merged": Saver(partial(merge, shard=1 << 30), lambda folder: values(load_file(folder / "model.safetensors"))),
        "merged, shards": Saver(partial(merge, shard=1), lambda folder: read_shards(folder, settle), read_shards),
        "json": Saver(lambda folder, v: write_whole(folder / "rows.json", f"{v}\n" * 100, "--json"), text("rows.json")),
        "tuning": Saver(lambda folder, v: tune.write({"tiles": [v] * 100}, folder / "gpu.json"), text("gpu.json")),
        "plot": Saver(draw, lambda folder: (folder / "loss.png").read_bytes(), every=4),
    }
