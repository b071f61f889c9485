"""lora_kernels._cpu (csrc/cpu/), where the package was built with it: loops that PyTorch operations do in many passes.

backends/cpu computes with it; mask.py and backends/torch/nf4.py give the same bits without it, in several times the time.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
PLAIN = (Tensor, torch.nn.Parameter)
INTERFACE = 6  # that of csrc/cpu/cpu.h


def load() -> tuple[Any, str]:
    """(the extension or None, why it is not there)."""
    try:
        found = importlib.import_module("lora_kernels._cpu")
    except ImportError as error:
        return None, f"csrc/cpu was not built, or cannot be loaded ({error})"
    if getattr(found, "interface", 0) != INTERFACE:
        return None, "csrc/cpu was built from other sources; build it again: python setup.py build_ext --inplace"
    return found, ""


extension, why_not = load()


def takes(*tensors: Tensor | None) -> bool:
    """Whether the extension is there and these tensors have addresses in a CPU's memory, which a compiler's do not."""
    if extension is None or torch.compiler.is_compiling():
        return False
    for t in tensors:  # noqa: SIM110  # a generator takes a µs more
        if t is not None and (type(t) not in PLAIN or t.device.type != "cpu"):
            return False
    return True


def rows(t: Tensor | None) -> tuple[int, int, str] | None:
    """t as csrc/cpu takes a matrix whose rows' elements are adjacent; a vector is one row."""
    return None if t is None else (t.data_ptr(), t.stride()[0], NAMES[t.dtype])
