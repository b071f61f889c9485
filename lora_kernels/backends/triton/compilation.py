"""What did not compile on this machine's GPUs, and the next tile in its place."""

import subprocess
from collections.abc import Callable
from typing import TypeVar

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ...plan import changed
from .tuned import Tile
from .tuning import candidates, gpu, padded_rank

T = TypeVar("T")

COMPILE_ERRORS = (OutOfResources, PTXASError, CompilationError, subprocess.CalledProcessError)
COMPILE_MESSAGES = ("PassManager", "C compiler")  # of RuntimeErrors: Triton's passes failed; nothing builds its launchers
rejected: dict[tuple[tuple[int, int], str, str, int, Tile], str] = {}  # capability, kernel, arithmetic, rank, tile
broken: dict[tuple[int, int], str] = {}  # GPUs on which some kernel has no tile left


class NothingCompilesError(RuntimeError):
    """No tile of a kernel compiles on this GPU."""


def compile_failure(error: Exception) -> str | None:
    """Why a kernel could not be compiled, in one line; None for any other error."""
    known = isinstance(error, (*COMPILE_ERRORS, NothingCompilesError))
    if known or (isinstance(error, RuntimeError) and any(message in str(error) for message in COMPILE_MESSAGES)):
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return None


def first_that_compiles(kernel: str, kind: str, R: int, device: torch.device, run: Callable[[Tile], T]) -> T:
    """run(tile) with the first tile of `kernel` that compiles on this device; refusals are kept with their reason."""
    capability = gpu(device).capability
    for tile in candidates(kernel, kind, R, device):
        key = (capability, kernel, kind, padded_rank(R), tile)
        if key not in rejected:
            try:
                return run(tile)
            except Exception as error:
                reason = compile_failure(error)
                if reason is None:
                    raise
                rejected[key] = reason
    sm = "sm_{}{}".format(*capability)
    raise NothingCompilesError(f"kernel {kernel!r} ({kind}, rank {R}) does not compile for {sm}: {rejected[key]}")


def give_up(device: torch.device, error: Exception, setting: str) -> None:
    """Where kernels do not compile, this GPU's calls go to PyTorch from now on, with this reason; any other error raises, and
    so does an explicit request.
    """
    reason = compile_failure(error)
    if reason is None or setting != "auto":
        raise error
    broken[gpu(device).capability] = reason
    changed()
