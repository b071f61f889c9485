"""LoRA linear layers that cost almost nothing beyond their frozen base layer: y = x·Wᵀ + (α/r)·drop(x)·Aᵀ·Bᵀ + c."""

from .backends import backend_report, use_backend
from .config import LoRAConfig
from .dropout import dropout_mask
from .export import save_merged
from .functional import lora_linear
from .modules import LoRALinear
from .nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from .surgery import (
    add_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)

__version__ = "0.1.0"

__all__ = [
    "LoRAConfig",
    "LoRALinear",
    "NF4Weight",
    "add_lora",
    "backend_report",
    "dequantize_nf4",
    "dropout_mask",
    "load_lora_state_dict",
    "lora_linear",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "quantize_nf4",
    "remove_lora",
    "save_merged",
    "set_adapter",
    "unmerge_lora",
    "use_backend",
]
