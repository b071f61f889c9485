"""LoRALinears and bitsandbytes' Linear4bits over 4-bit weights for the tests."""

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear

bnb = pytest.importorskip("bitsandbytes")
K, N = 128, 96


def layer4(dtype=torch.float32, r=4, bias=True, blocksize=64, double_quant=True, **adapter):
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    options = {"init_lora_weights": False, **adapter}
    return LoRALinear.from_linear(linear, quantize="nf4", r=r, blocksize=blocksize, double_quant=double_quant, **options)


def linear4bit(dtype=torch.float32, storage=torch.uint8, quant_type="nf4", double_quant=True, **options):
    layer = bnb.nn.Linear4bit(
        K, N, quant_storage=storage, quant_type=quant_type, compress_statistics=double_quant, **options
    ).to(dtype)
    return layer.to("cpu").train()  # in evaluation it repacks itself on some CPUs


def expected_y(layer, x):
    """The layer's equation with the dense weight."""
    W, name = layer.matrix.dequantize(x.dtype), layer.active_adapter
    y = nn.functional.linear(x, W, layer.bias.to(x.dtype))
    return y if name is None else y + layer.adapters[name].scaling * (x @ layer.lora_A[name].T @ layer.lora_B[name].T)
