"""What launches alike have in common, found out once and kept: the tile that compiles, what follows from it, the kernel.

Triton's own `kernel[grid](...)` binds and classifies every argument of every launch: 8 to 9 µs of Python, a kept kernel 1.
A kernel's file has two functions: one names what its launches depend on, the key, and calls the other, which gets the tile
and the key, nothing else, and returns run(tensors): arithmetic on the number of rows, allocations, launches.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ... import plan
from .compilation import compile_failure, first_that_compiles
from .tuning import Tile, arithmetic, trial

T = TypeVar("T")

LIMIT = 4096  # of everything that is kept here: beyond it all is forgotten, and found again
kept = functools.lru_cache(LIMIT)  # of functions whose arguments are a key, and which need no tile

_runs: dict[tuple, Callable[..., Any]] = {}


def call(kernel: str, make: Callable[..., Callable[..., T]], key: tuple, *arguments: Any) -> T:
    """make(tile, *key)(*arguments) with the first tile of `kernel` that compiles.

    key: (device, dtype of the activations, of the adapters, rank, and whatever else Triton compiles a kernel for: integers
    that are no `do_not_specialize`, other dtypes, which arguments are None). A Launch itself looks at addresses.
    """
    kind = kernel, plan.state, trial.get(kernel), key
    run = _runs.get(kind)
    if run is not None:
        try:
            return run(*arguments)
        except Exception as error:
            if compile_failure(error) is None:
                raise
            _runs.pop(kind, None)  # with these addresses it does not compile
    return _first_call(kernel, make, kind, arguments)


def _first_call(kernel: str, make: Callable[..., Callable[..., T]], kind: tuple, arguments: tuple) -> T:
    key = kind[-1]
    device, dtype, adapter, R = key[:4]

    def attempt(tile: Tile) -> T:
        run = make(tile, *key)
        result = run(*arguments)
        if len(_runs) >= LIMIT:
            _runs.clear()
        _runs[kind] = run
        return result

    return first_that_compiles(kernel, arithmetic(dtype, adapter), R, device, attempt)


class Launch:
    """kernel[grid](*arguments, **constants, **options) for arguments that differ in addresses and unspecialised numbers alone.

    The first launch on a device is Triton's own. The kernel that it compiled is kept and launched as JITFunction.run would
    (3.4 to 3.9), wherever every tensor begins at a multiple of 16 bytes and nobody watches launches. The constants are the
    kernel's last parameters, in any order; an argument that is None or a float in one call is so in all.
    """

    __slots__ = ("compiles", "constants", "kept", "kernel", "named")

    def __init__(self, kernel: Any, options: dict[str, Any], **constants: Any):
        self.kernel, self.named = kernel, {**constants, **options}
        self.compiles = isinstance(kernel, triton.JITFunction)  # the interpreter does not
        names = kernel.arg_names[-len(constants) :]
        if set(names) != set(constants):
            raise TypeError(
                f"the constants of {kernel.__name__}: got {sorted(constants)}, expected its last parameters {names}"
            )
        self.constants = tuple(constants[name] for name in names)
        self.kept: dict[int, tuple] = {}  # device -> what Triton launches, and which arguments are tensors

    def __call__(self, grid: tuple[int, int], *arguments: Any) -> None:
        if not self.compiles or _watched(self.kernel):
            self.kernel[grid](*arguments, **self.named)
            return
        active, addresses = driver.active, 0
        device = active.get_current_device()
        found = self.kept.get(device)
        for i in _tensors(arguments) if found is None else found[0]:
            addresses |= arguments[i].data_ptr()
        if found is None or addresses & 15:
            compiled = self.kernel[grid](*arguments, **self.named)
            if not addresses & 15 and hasattr(compiled, "run"):
                self.kept[device] = _tensors(arguments), compiled.run, compiled.function, compiled.packed_metadata
            return
        _, run, function, metadata = found
        stream = active.get_current_stream(device)
        run(*grid, 1, stream, function, metadata, None, None, None, *arguments, *self.constants)


def two(kernel: Any, options: dict[str, Any], **constants: Any) -> tuple[Launch, Launch]:
    """The launches of a kernel that leaves one part, in the result's dtype, and of one that leaves several, in float32."""
    return Launch(kernel, options, **constants), Launch(kernel, options, **constants)


def _tensors(arguments: tuple) -> tuple[int, ...]:
    return tuple(i for i, argument in enumerate(arguments) if isinstance(argument, Tensor))


def _watched(kernel: Any) -> bool:
    """Whether a profiler, or a hook of this kernel, is to see launches: Triton's own launch calls them."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # chains of calls; up to Triton 3.4 functions
    quiet = (enter is None or getattr(enter, "calls", True) == []) and (leave is None or getattr(leave, "calls", True) == [])
    return not quiet or bool(kernel.pre_run_hooks)


def specialized(number: int) -> tuple[bool, bool, bool]:
    """What Triton compiles a kernel for of an integer argument."""
    return number == 1, not number & 15, number >> 31 > 0


def dtype_of(t: Any) -> torch.dtype | None:
    """A tensor's dtype; None for None and for numbers."""
    return t.dtype if isinstance(t, Tensor) else None
