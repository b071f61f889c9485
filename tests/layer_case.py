"""LoRALinears over dense weights for the tests."""

import torch
from torch import nn

from lora_kernels import LoRALinear

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def layer(dtype=torch.float32, device="cpu", trained=True, **options):
    options = {"r": 4, "lora_alpha": 6, **options}
    made = LoRALinear(12, 10, device=device, dtype=dtype, **options)
    if trained:
        nn.init.normal_(made.lora_B["default"])
    return made


def dense(made, name="default"):
    """W + s·B·A in float64."""
    adapter = made.adapters[name]
    A, B = made.lora_A[name].double(), made.lora_B[name].double()
    return made.matrix.double() + adapter.scaling * B @ A
