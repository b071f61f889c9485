"""What a transformers model's configuration says of the 4-bit layers that add_lora made, so that transformers reads them."""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..layers.frozen_weight import is_conv1d, is_linear4bit
from ..layers.linear import LoRALinear
from .wrappers import named_modules


def quantization_config(model: Any, merged: bool = False) -> Any:
    """The BitsAndBytesConfig under which `from_pretrained` makes exactly the 4-bit layers of `model` Linear4bits; without such
    layers the model's own, maybe None. merged: they are written dense.

    Raises ValueError for layers that transformers would read as something else.
    """
    present = getattr(model.config, "quantization_config", None)
    modules = dict(named_modules(model, remove_duplicate=False))
    packed = {path: module for path, module in modules.items() if is_linear4bit(module) or _is_packed(module)}
    in_4_bits = present is None or getattr(present, "load_in_4bit", False)
    if packed and merged and in_4_bits:
        return None
    if not packed or merged:
        return present
    if not in_4_bits:
        raise ValueError(
            f"{next(iter(packed))}: in 4 bits beside layers that are quantised in another way, and transformers reads all of a "
            "model in one; add_lora without quantize leaves it dense"
        )
    from transformers import BitsAndBytesConfig

    storages = {_storage(module) for module in packed.values()}
    if len(storages) > 1:
        raise ValueError(
            f"4-bit layers: got codes stored as {', '.join(sorted(map(str, storages)))}, expected one dtype, as which "
            "transformers reads them all; load the model with bnb_4bit_quant_storage=torch.uint8, or call save_merged"
        )
    skipped = _skipped(model, packed, [path for path, module in modules.items() if _is_linear(module) and path not in packed])
    if present is not None:
        config = copy.deepcopy(present)
        config.llm_int8_skip_modules = skipped
        return config
    layer = next(module for module in packed.values() if isinstance(module, LoRALinear))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=layer.matrix.quant_type,  # type: ignore[union-attr]
        bnb_4bit_use_double_quant=layer.matrix.nested,  # type: ignore[union-attr]
        bnb_4bit_compute_dtype=layer.base_dtype,
        bnb_4bit_quant_storage=storages.pop(),
        llm_int8_skip_modules=skipped,
    )


def _skipped(model: Any, packed: Iterable[str], dense: list[str]) -> list[str]:
    """llm_int8_skip_modules that mean the layers `dense` and none that is packed."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    if not all(should_convert_module(path, dense) for path in packed):  # a name also means what begins or ends with it
        dense = [f"{re.escape(path)}$" for path in dense]
    kept = sorted(getattr(model, "_keep_in_fp32_modules", None) or [])
    if unread := [path for path in packed if not should_convert_module(path, dense + kept)]:
        raise ValueError(
            f"{', '.join(unread[:3])}: in 4 bits, but transformers keeps {kept} of a {type(model).__name__} dense and would "
            f"not read that; exclude_modules={kept} leaves them dense, and save_merged writes a dense model"
        )
    return dense


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear) and module.quantized


def _is_linear(module: nn.Module) -> bool:
    """Whether transformers would make it a Linear4bit, as the plain layer that it is or stands for."""
    return isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)


def _storage(module: Any) -> torch.dtype:
    return module.storage if isinstance(module, LoRALinear) else module.weight.dtype
