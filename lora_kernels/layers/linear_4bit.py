"""bitsandbytes' Linear4bit as these kernels read it: its weight, and the reasons why its own forward has to compute."""

from typing import Any

import torch
from torch import Tensor

from ..dtypes import autocast_dtype
from ..nf4 import NF4Weight


def quant_state(base: Any) -> Any:
    """Of a Linear4bit: at its weight, or where FSDP has replaced that, at the layer. None before it is quantised."""
    return getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)


def nf4_weight(base: Any) -> NF4Weight:
    """The weight of a Linear4bit, its bytes shared."""
    return NF4Weight.from_bnb(base.weight, quant_state(base))


def why_not_weight(base: Any) -> str | None:
    state = quant_state(base)
    if state is None or type(base.weight).__name__ not in ("Params4bit", "Parameter"):
        return f"the 4-bit weight is a {type(base.weight).__name__} that is not quantised"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes repacked the 4-bit weight for its CPU kernel"
    if base.weight.numel() * base.weight.element_size() != (state.shape.numel() + 1) // 2:
        return "the 4-bit weight is sharded"
    return None


def why_not_input(base: Any, x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "x is float64 over a 4-bit weight"
    if not base.compute_type_is_set:  # bitsandbytes does so at the first call
        base.set_compute_type(x)
        base.compute_type_is_set = True
    if autocast_dtype(x.device) is not None or base.compute_dtype in (None, x.dtype):
        return None
    # PEFT computes its adapter from x as it is. A CPU does the whole layer in float32 as fast as in 16 bits; a GPU would not.
    if x.dtype == torch.float32 and x.device.type == "cpu":
        return None
    return "the 4-bit layer's compute_dtype is not x's dtype"
