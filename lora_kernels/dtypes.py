"""torch's dtypes: their names, those that are computed with, and autocast's."""

import contextlib

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of torch.autocast where it is on for this device; None where it is off, or where there is none, as on meta."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast off: for what computes in dtypes that were decided before, forward and backward."""
    off = not torch._C._is_any_autocast_enabled() or autocast_dtype(device) is None
    return contextlib.nullcontext() if off else torch.autocast(device.type, enabled=False)
