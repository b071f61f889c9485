"""Whether these kernels run on a device, and what they had to replace on it."""

import contextlib

import torch
import triton
from torch import Tensor

from . import compilation, tuning
from .kernels.sums import sum_kernel

INTERPRETER = not isinstance(sum_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set when the kernels were defined


def why_not(device: torch.device, setting: str) -> str | None:
    """None where the kernels can run under this setting of use_backend, otherwise the reason that they cannot."""
    if device.type != "cuda" or torch.version.hip is not None:
        if not INTERPRETER:
            return f"needs CUDA tensors, got {device.type if torch.version.hip is None else 'ROCm'}"
        if setting == "auto":
            return "Triton's interpreter is on, which is for tests: it runs only if asked for by use_backend('triton')"
    capability = tuning.gpu(device).capability
    if capability < (8, 0):
        return "needs compute capability 8.0 or newer, got {}.{}".format(*capability)
    return compilation.broken.get(capability)


HERE = contextlib.nullcontext()


def device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """torch.cuda.device_of(t) only where another device is current: it asks the driver twice."""
    return HERE if not t.is_cuda or t.get_device() == torch.cuda.current_device() else torch.cuda.device_of(t)


def notes(device: torch.device) -> list[str]:
    """What did not compile on this GPU and was replaced by the next choice."""
    here = tuning.gpu(device).capability
    return [f"{kernel} {tile}: {why}" for (on, kernel, _, _, tile), why in compilation.rejected.items() if on == here]
