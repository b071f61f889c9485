"""Failures that are no fault of this package, such as a full disk or too little memory, as one line and an exit code."""

import os
import sys

from .console import FAILED, CommandError, first_line

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")  # torch's


def explained(error: Exception) -> CommandError | None:
    """`error` as the line that the command says of it; None for one that only its traceback explains."""
    if isinstance(error, CommandError):
        return error
    if isinstance(error, OSError) and error.strerror:
        return CommandError(f"{error.filename or 'cannot write the output'}: {error.strerror}", FAILED)
    if is_out_of_memory(error):
        cure = "use fewer tokens, smaller shapes or a smaller model"
        return CommandError(f"out of memory: {first_line(error) or type(error).__name__}; {cure}", FAILED)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Python's, or one of torch's: a GPU's has a class of its own, a CPU's is a RuntimeError."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY)


def give_up_output() -> None:
    """Write nothing more to an stdout that does not take it: Python would try again at exit, and complain."""
    if sys.stdout is None:  # closed by the shell
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
