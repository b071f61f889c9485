"""Whether a call's arguments fit: raised once, here, with the argument's name, what it is, what it should be, and the cure."""

from typing import Any

import torch
from torch import Tensor

from ..dtypes import FLOATS, autocast_dtype
from ..nf4 import NF4Weight
from ..values import LoRAWeights


def check_member(x: Tensor, member: LoRAWeights, of: str = "", features: int | None = None) -> None:
    """Raise TypeError or ValueError unless a projection fits x[..., K] and itself.

    of: what stands before a field's name in a message, such as "gate.". features: K, where the projection's input is not x but
    is made of it.
    """
    if not isinstance(member, LoRAWeights):
        raise TypeError(f"{of.rstrip('.')}: got {type(member).__name__}, expected LoRAWeights(weight, lora_A, lora_B, …)")
    check_tensors(x, member, of)
    _check_shapes(x, member, of, features)
    check_dtypes(x, member, of)
    check_scaling(member.scaling, x.device, of)


def check_tensors(x: Tensor, member: LoRAWeights, of: str) -> None:
    """Raise TypeError or ValueError unless all are tensors of floating-point numbers on x's device."""
    weight, lora_A, lora_B, bias, _, magnitude = member
    tensors: dict[str, Any] = {"x": x}
    if lora_A is not None or lora_B is not None:
        tensors |= {f"{of}lora_A": lora_A, f"{of}lora_B": lora_B}
    if isinstance(weight, NF4Weight):
        weight.check()
        if isinstance(x, Tensor) and weight.device != x.device:
            raise ValueError(
                f"{of}weight: got an NF4Weight on {weight.device}, expected {x.device} as x; use weight.to(x.device)"
            )
    else:
        tensors[f"{of}weight"] = weight
    if bias is not None:
        tensors[f"{of}bias"] = bias
    if magnitude is not None:
        tensors[f"{of}magnitude"] = magnitude
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected bfloat16, float16, float32 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {x.device} as x; use {name}.to(x.device)")


def _check_shapes(x: Tensor, member: LoRAWeights, of: str, features: int | None) -> None:
    weight, A, B, bias, _, magnitude = member
    for name, tensor, letters in (("weight", weight, "N, K"), ("lora_A", A, "R, K"), ("lora_B", B, "N, R")):
        if tensor is not None and tensor.ndim != 2:
            raise ValueError(f"{of}{name}: got shape {tuple(tensor.shape)}, expected two dimensions [{letters}]")
    (N, K), rank = weight.shape, ""
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    if A is not None and B is not None:
        R = A.shape[0]
        if R == 0:
            raise ValueError(
                f"{of}lora_A: got rank 0 (shape {tuple(A.shape)}), expected at least 1; for no adapter use F.linear"
            )
        rank, expected = f" and rank {R}", {"lora_A": (A, (R, K)), "lora_B": (B, (N, R))}
    if bias is not None:
        expected["bias"] = (bias, (N,))
    if magnitude is not None:
        expected["magnitude"] = (magnitude, (N,))
        if A is None:
            raise ValueError(f"{of}magnitude: got one for a plain member, expected None, or lora_A and lora_B beside it")
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            cure = f"; use {of}{name}.T" if tensor.ndim == 2 and tensor.T.shape == shape else ""
            raise ValueError(
                f"{of}{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"for weight {tuple(weight.shape)}{rank}{cure}"
            )
    if features is not None and features != K:
        raise ValueError(f"{of}weight: got shape {tuple(weight.shape)}, expected [{N}, {features}], the out-features before it")
    if x.ndim == 0 or (features is None and x.shape[-1] != K):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {K}] for {of}weight {tuple(weight.shape)}")


def check_dtypes(x: Tensor, member: LoRAWeights, of: str) -> None:
    """Raise TypeError unless the adapters share a dtype, and x, weight and bias one, or all are read as another."""
    weight, A, B, bias, _, _ = member
    if A is not None and B is not None and A.dtype != B.dtype:
        raise TypeError(f"{of}lora_B: got dtype {B.dtype}, expected {A.dtype} as lora_A; use lora_B.to(lora_A.dtype)")
    if isinstance(weight, NF4Weight):
        return  # weight and bias are read as x's dtype, or autocast's
    if autocast_dtype(x.device) is not None and torch.float64 not in (x.dtype, weight.dtype):
        return  # x, weight and bias are read as autocast's dtype
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x: got dtype {x.dtype}, expected {weight.dtype} as {of}weight; use x.to(weight.dtype), or torch.autocast"
        )
    # A wider bias, such as float32 beside a bfloat16 weight, keeps its gradient from being rounded to the weight's dtype.
    if bias is not None and torch.promote_types(bias.dtype, weight.dtype) != bias.dtype:
        raise TypeError(
            f"{of}bias: got dtype {bias.dtype}, expected {weight.dtype} as weight, or a wider one; "
            "use bias.to(weight.dtype), or torch.autocast"
        )


def check_scaling(scaling: float | Tensor, device: torch.device, of: str) -> None:
    """Raise TypeError or ValueError unless it is a number, or a 0-d tensor of one."""
    if not isinstance(scaling, Tensor):
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            raise TypeError(f"{of}scaling: got {type(scaling).__name__}, expected a float or a 0-d tensor")
        return
    if scaling.ndim != 0 or not scaling.is_floating_point():
        raise ValueError(
            f"{of}scaling: got a {scaling.dtype} tensor of shape {tuple(scaling.shape)}, expected a 0-d floating-point tensor"
        )
    if scaling.device != device and scaling.device.type != "cpu":
        raise ValueError(f"{of}scaling: got a tensor on {scaling.device}, expected {device}; use scaling.to({str(device)!r})")
    if scaling.requires_grad:
        raise ValueError(f"{of}scaling: requires_grad is set, but scaling has no gradient here; use scaling.detach()")
