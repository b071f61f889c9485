"""Which backend computes a call, and why: the registry of backends, what a plan may depend on, and the plan.

A backend registers a loader, which gives its module for an operation, the one with the operation's basename. That has

    FIELDS                 the fields of a member that it reads; a call that sets another one is refused here
    plan(call) -> Plan     the functions that compute the call; or a str, the reason why they cannot
    notes(device)          optional: what had to be replaced on this device, and why

This file imports nothing of the package: whoever asks is above it, whoever answers has registered.
"""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

ENVIRONMENT_VARIABLE = "LORA_KERNELS_BACKEND"
BACKENDS: dict[str, Callable[[str], ModuleType]] = {}  # in the order of "auto"


def register(name: str, loader: Callable[[str], ModuleType]) -> None:
    """Make `name` a backend, after those before it; loader(operation) imports its module, or raises ImportError."""
    BACKENDS[name] = loader


@functools.cache
def load(name: str, operation: str) -> ModuleType | str:
    """The backend's module for an operation, or the reason why there is none here."""
    try:
        return BACKENDS[name](operation)
    except ModuleNotFoundError as error:
        if (error.name or "").endswith(f".{name}.{operation}"):
            return f"it has no {operation!r}"
        return f"the package {error.name!r} is not installed"
    except ImportError as error:
        return str(error)


setting = os.environ.get(ENVIRONMENT_VARIABLE, "auto")  # use_backend's: a global, which a compiled graph has a guard on


class _Current(type):
    @property
    def current(cls) -> str:
        """The backend that is set."""
        return setting


class use_backend(metaclass=_Current):
    """Make `name` the backend of every call: "auto" (the default), "cuda", "triton", "cpu" or "torch".

    A plain call sets it for the process, threads included; as a context manager it is restored at the end. A backward pass
    runs where its forward pass ran, whatever is set by then. With "auto" each call takes the first backend that can compute
    it. A named backend that cannot raises at the call, or here if it is not there at all: there is no silent fallback. The
    environment variable LORA_KERNELS_BACKEND sets the initial value.
    """

    def __init__(self, name: str):
        if name not in ("auto", *BACKENDS):
            raise ValueError(f"backend: got {name!r}, expected 'auto', " + ", ".join(map(repr, BACKENDS)))
        if name != "auto" and isinstance(missing := load(name, "linear"), str):
            raise RuntimeError(f"backend {name!r} is not available: {missing}; use 'auto' or 'torch'")
        global setting
        self.previous, setting = setting, name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        global setting
        setting = self.previous


PLAIN = (Tensor, torch.nn.Parameter)


class Layout(NamedTuple):
    """What a plan may depend on of a tensor; quant_type is that of a 4-bit weight, whose stride is empty."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # to 16 bytes
    plain: bool  # a Tensor or Parameter itself, at whose address its elements are; of a 4-bit weight, all of its tensors
    quant_type: str | None = None


class Call(NamedTuple):
    """A kind of call: what its plan may depend on, hashable. x is flattened to rows; members hold a Layout for each tensor."""

    operation: str
    setting: str  # use_backend's
    device: torch.device
    dtype: torch.dtype  # in which x, weight and bias are read
    x: Layout
    members: tuple[Any, ...]
    p: float = 0.0  # of dropout
    offset: int = 0  # of its first mask
    options: tuple[Any, ...] = ()

    fields: frozenset[str] = frozenset()  # of the members, those that are not at their default

    @property
    def rows(self) -> int:
        return self.x.shape[0]


class Plan(NamedTuple):
    """Who computes a call: forward(x, members, dropout, *options) -> (results, saved), and
    backward(grads, x, members, saved, dropout, needs, *options) -> Grads.
    """

    backend: str
    why: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def layout(value: Any) -> Any:
    """The Layout of a tensor or a 4-bit weight; the kind of Rows; any other value is itself."""
    if isinstance(value, Tensor):
        return Layout(value.shape, value.stride(), value.dtype, value.data_ptr() % 16 == 0, type(value) in PLAIN)
    if hasattr(value, "quant_type"):
        plain = all(type(t) in PLAIN for t in value.tensors().values())
        return Layout(value.shape, (), value.dtype, value.codes.data_ptr() % 16 == 0, plain, value.quant_type)
    return value.kind if hasattr(value, "kind") else value


def describe(
    operation: str,
    setting: str,
    dtype: torch.dtype,
    x: Tensor,
    members: tuple[Any, ...],
    dropout: Any,
    options: tuple[Any, ...],
) -> Call:
    """The Call of an operation on x[M, K], members (named tuples that hold tensors), and dropout, which has p and offset."""
    layouts, fields = [], set()
    for member in members:
        defaults = member._field_defaults
        fields |= {name for name, value in zip(member._fields, member, strict=True) if value is not defaults.get(name, ...)}
        layouts.append(member._make([layout(value) for value in member]))
    p, offset = (0.0, 0) if dropout is None else (dropout.p, dropout.offset)
    own = tuple([layout(option) for option in options])
    return Call(operation, setting, x.device, dtype, layout(x), tuple(layouts), p, offset, own, frozenset(fields))


state = 0  # of the backends: another number means that they may answer a Call in another way


def changed() -> None:
    """A backend says so when it answers in another way from now on, so that nobody keeps its old plans."""
    global state
    state += 1


def choose(call: Call) -> Plan:
    """The plan of the first backend that can compute the call. Raises RuntimeError if a requested one cannot."""
    reason: str | None = None
    for name in _asked(call.setting):
        found = _plan(name, call)
        if isinstance(found, Plan):
            return found
        reason = found
    raise RuntimeError(
        f"backend {call.setting!r} was requested but cannot compute this call: {reason}; use use_backend('auto')"
    )


def _asked(setting: str) -> tuple[str, ...]:
    if setting not in ("auto", *BACKENDS):  # only the environment variable is not checked before
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: got {setting!r}, expected 'auto', " + ", ".join(map(repr, BACKENDS)))
    return tuple(BACKENDS) if setting == "auto" else (setting,)


def _plan(name: str, call: Call) -> Plan | str:
    """The plan of backend `name`, or the reason why it has none."""
    module = load(name, call.operation)
    if isinstance(module, str):
        return module
    if not call.fields <= module.FIELDS:
        return f"it does not know {', '.join(sorted(call.fields - module.FIELDS))}"
    return module.plan(call)


def modules(operation: str) -> Iterator[ModuleType]:
    """The modules of an operation without gradients, such as "nf4": those asked for, then PyTorch's, which can do all."""
    for name in dict.fromkeys((*_asked(setting), "torch")):
        module = load(name, operation)
        if not isinstance(module, str):
            yield module


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


def report(call: Call) -> BackendReport:
    """Why each backend is or is not used for the call."""
    rows, taken = BackendReport(), False
    for name in BACKENDS:
        found = _plan(name, call)
        asked = call.setting in ("auto", name)
        used = isinstance(found, Plan) and asked and not taken
        if isinstance(found, str):
            reason = found
        elif used:
            notes = getattr(load(name, call.operation), "notes", None)  # what this backend had to replace, and why
            reason = "; ".join([found.why, *(notes(call.device) if notes else ())])
        else:
            reason = "one before it is used" if asked else f"use_backend({call.setting!r}) is set"
        rows.append(BackendRow(name, isinstance(found, Plan), used, reason))
        taken = taken or used
    return rows
