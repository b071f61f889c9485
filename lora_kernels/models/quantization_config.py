"""What a transformers model's configuration says of the 4-bit layers that add_lora made, so that transformers reads them."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..layers.experts import is_experts, weight_names
from ..layers.experts_4bit import quantized_stack
from ..layers.frozen_weight import is_conv1d, is_linear4bit
from ..layers.linear import LoRALinear
from ..layers.lora_experts import LoRAStack
from .wrappers import named_modules


def quantization_config(model: Any, merged: bool = False) -> Any:
    """The BitsAndBytesConfig under which `from_pretrained` makes exactly the 4-bit layers of `model` Linear4bits; without such
    layers the model's own, maybe None. merged: they are written dense.

    Raises ValueError for layers that transformers would read as something else.
    """
    present = getattr(model.config, "quantization_config", None)
    modules = dict(named_modules(model, remove_duplicate=False))
    if not merged and (stacks := _packed_stacks(modules)):
        raise ValueError(
            f"{stacks[0]}: a stack of experts in 4 bits, which transformers cannot read; call save_merged, or write the "
            "adapters by save_adapter and the model's state_dict()"
        )
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
    skipped = _skipped(packed, [path for path, module in modules.items() if _is_linear(module) and path not in packed])
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


def kept_dense(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Which plain layers of `modules`, by path, a transformers model in `model` keeps out of quantisation, with the reason: T5
    reads the dtype of such a weight, and transformers would read no codes there.
    """
    reasons: dict[str, str] = {}
    for outer, owner in named_modules(model):
        kept = getattr(owner, "_keep_in_fp32_modules", None)
        if not kept:
            continue
        from transformers.quantizers.quantizers_utils import should_convert_module

        for path, module in modules.items():
            inner = path.removeprefix(f"{outer}." if outer else "")
            plain = not isinstance(module, LoRALinear) and not is_linear4bit(module)
            if plain and (not outer or inner != path) and not should_convert_module(inner, sorted(kept)):
                reasons.setdefault(path, f"{type(owner).__name__} lists {sorted(kept)} in _keep_in_fp32_modules")
    return reasons


def _skipped(packed: Iterable[str], dense: list[str]) -> list[str]:
    """llm_int8_skip_modules that mean the layers `dense` and none that is packed."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    if not all(should_convert_module(path, dense) for path in packed):  # a name also means what begins or ends with it
        dense = [f"{re.escape(path)}$" for path in dense]
    return dense


def _packed_stacks(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of the stacks of experts in 4 bits."""
    found = [path for path, module in modules.items() if isinstance(module, LoRAStack) and module.quantized]
    experts = {path: module for path, module in modules.items() if is_experts(module)}
    names = [(path, name, module) for path, module in experts.items() for name in weight_names(module)]
    return found + [f"{path}.{name}" for path, name, module in names if quantized_stack(module, name) is not None]


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, LoRALinear) and module.quantized


def _is_linear(module: nn.Module) -> bool:
    """Whether transformers would make it a Linear4bit, as the plain layer that it is or stands for."""
    return isinstance(module, (nn.Linear, LoRALinear)) or is_conv1d(module)


def _storage(module: Any) -> torch.dtype:
    return module.storage if isinstance(module, LoRALinear) else module.weight.dtype
