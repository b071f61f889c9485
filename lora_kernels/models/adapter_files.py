"""Read an adapter's files, which PEFT or save_adapter wrote, into a model."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import check_adapter_name
from ..layers.linear import DEFAULT_ADAPTER
from . import adapter_config
from .adalora.config import AdaLoRAConfig
from .adalora.files import expanded
from .adapter_checks import check_settings, check_tensors, not_linear
from .adapter_keys import MAGNITUDE, PREFIX, adapter_tensors, exchanged_tensors, forms, planned_forms
from .adapter_saving import CONFIG_FILE, WEIGHTS_FILE, subfolder
from .config import LoRAConfig
from .distributed import sharded_like
from .embeddings import add_embeddings, brought_embeddings
from .expert_files import refuse_exchanged
from .peft_layers import refuse_peft_layers
from .state import lora_layers, lora_state, refuse_if_merged, refuse_offloaded_adapters
from .surgery import add_adapter
from .switching import active_adapter
from .targets import plan_layers


@dataclass(frozen=True)
class LoadedAdapter:
    """What load_adapter read; str() is for people."""

    adapter: str
    directory: Path  # in which the files are
    config: LoRAConfig
    adapted: dict[str, int]  # path -> r
    tensors: tuple[str, ...]  # all keys that were read
    active: bool  # otherwise it waits for set_adapter

    def __str__(self) -> str:
        ranks = ", ".join(map(str, sorted(set(self.adapted.values()))))
        waits = "" if self.active else f"; not active: call set_adapter(model, {self.adapter!r})"
        whole = [key.removeprefix(PREFIX) for key in self.tensors if ".lora_" not in key]
        lines = [f"adapter {self.adapter!r} from {self.directory}: {len(self.adapted)} LoRA layers, r = {ranks}{waits}"]
        return "\n".join(lines + [f"  whole: {key}" for key in whole])


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    autocast_adapter_dtype: bool = True,
    quantize: str | None = None,
) -> LoadedAdapter:
    """Read an adapter that PEFT or save_adapter wrote, as `adapter_name` of `model`.

    It is read from the subfolder `adapter_name` if there is one with an adapter, else from `directory` itself. A model that has
    an adapter of that name gets its values; otherwise the adapter is added, as by add_lora with the file's configuration
    and the same `autocast_adapter_dtype` and `quantize`. Where the file has the embedding and the head of a resized model, the
    adapter gets frozen copies of them. Returns what was read, for people too.
    Raises FileNotFoundError or ValueError, before anything changes, for files that are missing or damaged, a configuration
    that has no counterpart here, keys or shapes that are not exactly those of this model, and values that are NaN or infinite,
    or would be in the adapter's dtype; RuntimeError for a model that is merged, or whose adapters accelerate offloads.
    """
    check_adapter_name(adapter_name, "adapter_name")
    refuse_peft_layers(model)
    folder = Path(directory)
    if (subfolder(directory, adapter_name) / CONFIG_FILE).is_file():
        folder = subfolder(directory, adapter_name)
    values, saved = _read(folder)
    saved = {key.removesuffix(".weight") if key.endswith(f".{MAGNITUDE}.weight") else key: t for key, t in saved.items()}
    config = adapter_config.from_peft(values, model, str(folder / CONFIG_FILE))
    kept: dict[str, Tensor] = {}
    if isinstance(config, AdaLoRAConfig):
        saved, kept = expanded(saved, values.get("rank_pattern"), str(folder / CONFIG_FILE))
    refuse_if_merged(lora_layers(model), "load an adapter")
    refuse_offloaded_adapters(model, "load an adapter")
    present = adapter_name in lora_state(model).configs
    if present:
        check_settings(model, config, adapter_name, folder)
        expected = forms(adapter_tensors(model, adapter_name))
        layers: Mapping[str, object] = {path: own for path, own in lora_layers(model).items() if adapter_name in own.adapters}
    else:
        try:
            plan = plan_layers(model, config, adapter_name)
            expected, layers = planned_forms(model, config, plan.modules, autocast_adapter_dtype), plan.modules
        except ValueError as error:
            why = "; ".join([str(error), *not_linear(model, saved).values()])
            raise ValueError(f"{folder / CONFIG_FILE}: {why}") from error
    refuse_exchanged(values, layers, saved, expected, str(folder / WEIGHTS_FILE))
    brought = brought_embeddings(model, saved, expected)
    expected |= forms(exchanged_tensors(brought))
    weights = check_tensors(model, saved, expected, folder / WEIGHTS_FILE)
    if not present:
        add_adapter(model, config, adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype, quantize=quantize)
    add_embeddings(model, adapter_name, brought)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, adapter_name).items():
            tensor.copy_(sharded_like(weights[key], tensor))
    if isinstance(config, AdaLoRAConfig):
        lora_state(model).allocations[adapter_name] = kept
    adapted = {
        path: layer.adapters[adapter_name].r for path, layer in lora_layers(model).items() if adapter_name in layer.adapters
    }
    return LoadedAdapter(adapter_name, folder, config, adapted, tuple(weights), active_adapter(model) == adapter_name)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors on the CPU) of the adapter in `directory`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
            pickled = "; adapter_model.bin is a pickle, which is not read: save it as safetensors" * (
                "adapter_model.bin" in found
            )
            raise FileNotFoundError(f"{directory}: {name} is missing; found {found}{pickled}")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: not JSON, or cut off: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG_FILE}: got a {type(config).__name__}, expected an object")
    try:
        return config, load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS_FILE}: no safetensors file, or cut off: {error}") from error
