"""LoRA linear layers that cost almost nothing beyond their frozen base layer: y = x·Wᵀ + (α/r)·drop(x)·Aᵀ·Bᵀ + c."""

from .backends import backend_report, use_backend
from .dropout import dropout_mask
from .functional import lora_linear

__version__ = "0.1.0"
