"""Layers with DoRA for the tests, and what they compute, by PyTorch's own operations."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import LoRALinear

KINDS = ("lora_A", "lora_B", "lora_magnitude")


def conv1d(K=24, N=33):
    made = Conv1D(N, K)
    nn.init.normal_(made.weight, std=0.1)
    nn.init.normal_(made.bias)
    return made


BASES = {
    "dense": (lambda: nn.Linear(64, 32), {}),
    "conv1d": (lambda: conv1d(64, 32), {}),
    "nf4": (lambda: nn.Linear(64, 32), {"quantize": "nf4"}),
}


def layer(dtype=torch.float32, adapter_dtype=None, base=None, trained=True, **options):
    """A layer with DoRA whose m is not n, as after training."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 33, dtype=dtype) if base is None else base
    options = {"r": 5, "lora_alpha": 7, "init_lora_weights": False, "use_dora": True, **options}
    made = LoRALinear.from_linear(linear, dtype=adapter_dtype, **options)
    if trained:
        with torch.no_grad():
            made.lora_magnitude["default"].mul_(torch.rand(made.out_features) + 0.5)
    return made


def tensors(made, name="default"):
    return [getattr(made, kind)[name] for kind in KINDS]


def equation(x, W, c, A, B, m, s, drop=lambda x: x):
    """y = (m / n) ⊙ (x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + c, n = ‖W + s·B·A‖ held constant."""
    n = (W.to(A.dtype) + s * B @ A).norm(dim=1).detach()
    v = (x @ W.T).to(A.dtype) + s * (drop(x).to(A.dtype) @ A.T @ B.T)
    return (m / n * v).to(x.dtype) + c


def dense(made, name="default"):
    """(m / n) ⊙ (W + s·B·A) in float64."""
    W, s = made.matrix, made.adapters[name].scaling
    A, B, m = (t.detach().double() for t in tensors(made, name))
    total = (W if isinstance(W, torch.Tensor) else W.dequantize(torch.float32)).detach().double() + s * B @ A
    return (m / total.norm(dim=1))[:, None] * total
