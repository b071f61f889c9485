"""Which backend computes a call: chosen per call from the tensors, in the order of BACKENDS, and always with a reason.

A backend is a module with the contract's functions, `lora_forward` and `lora_backward`, and
`why_not(x, weight, lora_A, lora_B)`, which returns None where it can compute with these tensors, otherwise the reason why not.
A weight may be an NF4Weight where the module says `READS_NF4 = True`.
"""

import functools
import importlib
import os
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from .nf4.weight import NF4Weight

BACKENDS = {
    "cuda": "lora_kernels.backends.cuda.linear",
    "triton": "lora_kernels.backends.triton",
    "torch": "lora_kernels.backends.torch.linear",
}
ENVIRONMENT_VARIABLE = "LORA_KERNELS_BACKEND"


class use_backend:
    """Make `name` the backend of every call: "auto" (the default), "torch", "triton" or "cuda".

    A plain call sets it for the process, threads included (autograd runs backward in its own); as a context manager it is
    restored at the end. With "auto" each call takes the first backend that can compute it. A named backend that cannot raises
    at the call, or here if it is not there at all: there is no silent fallback. The environment variable LORA_KERNELS_BACKEND
    sets the initial value.
    """

    current = os.environ.get(ENVIRONMENT_VARIABLE, "auto")

    def __init__(self, name: str):
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"backend: got {name!r}, expected 'auto', " + ", ".join(map(repr, BACKENDS)))
        if name != "auto" and isinstance(missing := load(name), str):
            raise RuntimeError(f"backend {name!r} is not available: {missing}; use 'auto' or 'torch'")
        self.previous, use_backend.current = use_backend.current, name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        use_backend.current = self.previous


@functools.cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(BACKENDS[name])
    except ModuleNotFoundError as error:
        if error.name == BACKENDS[name]:
            return "this version of lora_kernels has no such kernels"
        return f"the package {error.name!r} is not installed"
    except ImportError as error:
        return str(error)


Weight = Tensor | NF4Weight


def why_not(name: str, x: Tensor, weight: Weight | None, lora_A: Tensor | None, lora_B: Tensor | None) -> str | None:
    """None if backend `name` can compute with these tensors, otherwise the reason that it cannot."""
    backend = load(name)
    if isinstance(backend, str):
        return backend
    if isinstance(weight, NF4Weight) and not getattr(backend, "READS_NF4", False):
        return f"weight is 4-bit ({weight.quant_type}), for which there are no kernels here"
    return backend.why_not(x, weight, lora_A, lora_B)


def choose(x: Tensor, weight: Weight | None, lora_A: Tensor | None, lora_B: Tensor | None) -> ModuleType:
    """The backend that computes with these tensors. Raises RuntimeError if an explicitly requested one cannot."""
    requested = use_backend.current
    if requested not in ("auto", *BACKENDS):  # only the environment variable is not checked before
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: got {requested!r}, expected 'auto', " + ", ".join(map(repr, BACKENDS)))
    reason = None
    for name in BACKENDS if requested == "auto" else (requested,):
        reason = why_not(name, x, weight, lora_A, lora_B)
        if reason is None:
            return load(name)  # type: ignore[return-value]
    raise RuntimeError(f"backend {requested!r} was requested but cannot compute this call: {reason}; use use_backend('auto')")


def nf4_kernels(t: Tensor, function: str) -> ModuleType | None:
    """The first backend with a `function`, "nf4_dequantize" or "nf4_quantize", for tensors like `t`; None for plain PyTorch."""
    for name in BACKENDS if use_backend.current == "auto" else (use_backend.current,):
        backend = load(name) if name in BACKENDS else ""
        if not isinstance(backend, str) and hasattr(backend, function) and backend.nf4_why_not(t) is None:
            return backend
    return None


@dataclass(frozen=True)
class BackendRow:
    backend: str
    usable: bool
    used: bool
    reason: str


class BackendReport(list[BackendRow]):
    """The rows of `backend_report`; str() is a table of them."""

    def __str__(self) -> str:
        return "\n".join(f"{row.backend:8}{'used' if row.used else 'not used':10}{row.reason}" for row in self)


def backend_report(
    x: Tensor, weight: Weight | None = None, lora_A: Tensor | None = None, lora_B: Tensor | None = None
) -> BackendReport:
    """Why each backend is or is not used for a call with these tensors, under the current `use_backend` setting."""
    report, taken = BackendReport(), False
    for name in BACKENDS:
        obstacle = why_not(name, x, weight, lora_A, lora_B)
        asked = use_backend.current in ("auto", name)
        used = obstacle is None and asked and not taken
        if obstacle is not None:
            reason = obstacle
        elif used:
            notes = getattr(load(name), "notes", None)  # what this backend had to replace, and why
            reason = "; ".join(["the first that can compute this call", *(notes(x) if notes else ())])
        else:
            reason = "one before it is used" if asked else f"use_backend({use_backend.current!r}) is set"
        report.append(BackendRow(name, obstacle is None, used, reason))
        taken = taken or used
    return report
