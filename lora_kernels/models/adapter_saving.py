"""Write an adapter of a model changed by add_lora into PEFT's own files, adapter_config.json and adapter_model.safetensors."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import DEFAULT_ADAPTER
from . import adapter_config
from .adapter_keys import adapter_tensors
from .atomic_files import all_or_nothing
from .distributed import full, is_sharded
from .state import lora_state, unwrapped

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Write adapter `adapter_name` of `model` so that PEFT, and load_adapter, read it: two files, complete or not at all.

    As in PEFT, "default" goes into `directory` itself, another name into a subfolder of that name. Where parameters are sharded
    (FSDP2), every process has to call it, and the first one writes.
    Raises KeyError for an unknown adapter, and ValueError, before anything is written, for what PEFT's format cannot say.
    """
    model = unwrapped(model)
    state = lora_state(model)
    if adapter_name not in state.configs:
        raise KeyError(f"adapter {adapter_name!r}: not found; adapters here: {list(state.configs)}, made by add_lora")
    config = adapter_config.to_peft(model, state.configs[adapter_name], adapter_name)
    own = adapter_tensors(model, adapter_name)
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(f"adapter {adapter_name!r}: it is on the meta device and has no values; fill it first")
    whole = {key: full(tensor).detach().to("cpu", copy=True).contiguous() for key, tensor in own.items()}
    sharded = any(is_sharded(tensor) for tensor in own.values())
    if not sharded or torch.distributed.get_rank() == 0:
        target = Path(directory) if adapter_name == DEFAULT_ADAPTER else Path(directory) / adapter_name
        _write(target, config, whole)
    if sharded:
        torch.distributed.barrier()


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with all_or_nothing(directory) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
