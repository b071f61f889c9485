"""The accelerated form of PEFT's LoRA layer over nn.Conv2d."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ...dtypes import autocast_dtype
from ...functional.conv2d import lora_conv2d
from ...layers.conv2d import why_not_conv2d
from ...layers.merging import bias_sum
from .linear import ShownAsPeft
from .not_linear import NotLinear, why_not_tensors
from .parts import dropout_p, why_not_called

WINDOW = ("stride", "padding", "dilation")


class AcceleratedConv2d(NotLinear, lora.Conv2d, metaclass=ShownAsPeft):
    """peft.tuners.lora.Conv2d over an nn.Conv2d with groups = 1, computed by lora_conv2d."""

    def _why_not_adapter(self: Any, name: str) -> str | None:
        base, A, B, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        for what, module in (("the base layer", base), ("lora_A", A), ("lora_B", B)):
            if type(module).forward is not nn.Conv2d.forward:
                return f"{what} is a {type(module).__name__}"
        if (reason := why_not_conv2d(base)) is not None:
            return reason
        if any(getattr(A, option) != getattr(base, option) for option in WINDOW):
            return "lora_A has another stride, padding or dilation than the base layer: PEFT gives it no dilation"
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"lora_dropout is a {type(dropout).__name__}"
        if A.bias is not None:
            return "lora_A has a bias"
        if A.weight.dtype != B.weight.dtype:
            return "lora_A and lora_B differ in dtype"
        tensors = base.weight, base.bias, A.weight, B.weight, B.bias
        return why_not_called((base, A, B, dropout), hooked=True) or why_not_tensors(*tensors)

    def _why_not_input(self: Any, x: Tensor, name: str) -> str | None:
        base, A = self.base_layer, self.lora_A[name]
        if (reason := why_not_tensors(base.weight, x)) is not None:
            return reason
        if x.dtype != A.weight.dtype and not self.cast_input_dtype_enabled:
            return "casting of the input is disabled"
        autocast = autocast_dtype(x.device) is not None and torch.float64 not in (x.dtype, base.weight.dtype)
        bias = base.weight if base.bias is None else base.bias
        if not autocast and not x.dtype == base.weight.dtype == bias.dtype:
            return "x, weight and bias differ in dtype"
        return None if x.ndim == 4 and x.shape[1] == base.in_channels else "x is not [n, in_channels, ·, ·]"

    def _computed(self: Any, x: Tensor, name: str) -> Tensor:
        base, B, s = self.base_layer, self.lora_B[name], self.scaling[name]
        c = base.bias if B.bias is None else bias_sum(base.bias, B.bias, s, base.weight.dtype)
        options = {option: getattr(base, option) for option in WINDOW}
        p = dropout_p(self.lora_dropout[name])
        return lora_conv2d(x, base.weight, self.lora_A[name].weight, B.weight, c, scaling=s, dropout_p=p, **options)
