"""The activations of an MLP and their derivatives.

silu       v·σ(v)
gelu       v·Φ(v), with erf
gelu_tanh  v/2·(1 + tanh(√(2/π)·(v + 0.044715·v³)))
relu2      relu(v)²
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def act(v: Tensor, activation: str) -> Tensor:
    """act(v)."""
    return _ACT[activation](v)


def act_derivative(v: Tensor, activation: str) -> Tensor:
    """act'(v)."""
    if activation == "silu":
        return torch.sigmoid(v) * (1 + v * (1 - torch.sigmoid(v)))
    if activation == "gelu":
        return (1 + torch.erf(v / math.sqrt(2))) / 2 + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        t = torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))
        return (1 + t) / 2 + v / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v * v)
    return 2 * F.relu(v)


_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu2": lambda v: F.relu(v).square(),
}
