"""Which calls kernels compute, and PyTorch's functions in their place where they do not compile."""

from collections.abc import Callable
from typing import Any

import torch

from ...plan import Call, Plan
from ..magnitude import Functions, around
from ..torch import magnitude as pytorch
from . import gpu
from .compilation import give_up
from .magnitude import STEPS

READ = ("weight", "lora_A", "lora_B", "magnitude")


def refusal(call: Call) -> str | None:
    """Why there are no kernels for this call, or None."""
    if (reason := gpu.why_not(call.device, call.setting)) is not None:
        return reason
    tensors = [(name, getattr(member, name)) for member in call.members for name in READ]
    for name, tensor in (("x", call.x), *tensors):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"{name} is float64, for which there are no kernels"
    if call.rows >= 1 << 31:
        return f"got {call.rows} rows, kernels count them in 31 bits"
    return None


def plan_of(backend: str, call: Call, kernels: Functions, otherwise: Functions) -> Plan:
    """The plan of forward and backward over kernels, with PyTorch's in their place where kernels do not compile."""
    if "magnitude" in call.fields:
        kernels, otherwise = around(kernels, STEPS), around(otherwise, pytorch.STEPS)
    why = "the first that can compute this call"
    forward, backward = [_or_pytorch(*pair, call.setting) for pair in zip(kernels, otherwise, strict=True)]
    return Plan(backend, why, forward, backward)


def _or_pytorch(kernels: Callable[..., Any], otherwise: Callable[..., Any], setting: str) -> Callable[..., Any]:
    """`kernels`, or `otherwise` from the moment that some kernel has no tile left that compiles; a request by name raises."""

    def run(first: Any, *rest: Any) -> Any:
        tensor = first  # backward's are the gradients of the results, None of those that were not used
        if isinstance(first, tuple):
            tensor = first[0] if first[0] is not None else next(t for t in first if t is not None)
        try:
            with gpu.device_of(tensor):
                return kernels(first, *rest)
        except Exception as error:
            give_up(tensor.device, error, setting)
            return otherwise(first, *rest)

    return run
