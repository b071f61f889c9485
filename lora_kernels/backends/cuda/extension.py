"""lora_kernels._C: its dtypes, its view of a 4-bit weight, and where it runs."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ...nf4 import NF4Weight
from ...nf4.tables import code_values

try:
    C: Any = importlib.import_module("lora_kernels._C")
except ImportError as error:
    raise ImportError(
        "the CUDA extension was not built; where nvcc is, `pip install .` or `python setup.py build_ext --inplace` builds it"
    ) from error

EMULATED = hasattr(C, "emulated")  # the tests' build for CPUs
DTYPES = {torch.bfloat16: C.Dtype.bf16, torch.float16: C.Dtype.fp16, torch.float32: C.Dtype.fp32}


def why_not(device: torch.device, setting: str) -> str | None:
    """None where the extension can run under this setting of use_backend, otherwise the reason that it cannot."""
    if EMULATED and (setting == "auto" or device.type != "cpu"):
        return "the extension is the tests' emulation: it runs on CPU tensors only if asked for by use_backend('cuda')"
    if device.type != "cuda" and not EMULATED:
        return f"needs CUDA tensors, got {device.type}"
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return None if capability >= (8, 0) else "needs compute capability 8.0 or newer, got {}.{}".format(*capability)


def descriptor(w: NF4Weight, rows: int | None = None, columns: int | None = None) -> Any:
    """The extension's view of a weight, by default of its rows and columns; it holds addresses, not the tensors."""
    nested = [address(t) for t in (w.nested_absmax, w.nested_map, w.nested_offset)]
    shape = rows or w.numel() // w.shape[-1], columns or w.shape[-1]
    return C.Weight(w.codes.data_ptr(), w.absmax.data_ptr(), *nested, *shape, w.blocksize, values(w.quant_type))


@functools.cache
def values(quant_type: str) -> list[float]:
    """The value of each code."""
    return code_values(quant_type).tolist()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.device.type == "cuda" else 0
