"""Read one .safetensors file of an adapter: its header first, and tensors only once every key and dtype is fine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .keys import parse

FLOATS = ("F64", "F32", "BF16", "F16")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")  # an alpha may be one
PICKLED = (b"PK\x03\x04", b"\x80")  # how files of torch.save begin, new and old


class Contents(NamedTuple):
    """A file's tensors, on the CPU, and the strings of its header."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_file(path: Path) -> Contents:
    """Raises FileNotFoundError for a missing file, and ValueError, naming file and key, for a pickle, a damaged file, keys
    that are no LoRA's, and tensors that are no plain floating-point ones.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(PICKLED) and start[8:] != b"{":  # a safetensors header's length may begin alike
        raise ValueError(f"{path}: a pickle, which can run any code and is not read; save it as safetensors")
    with opened(path) as file:
        keys = sorted(file.keys())
        for key in keys:
            _check(path, key, file.get_slice(key).get_dtype())
        return Contents({key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {}))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file, by safetensors: its header, compared with its size, and its tensors as parts of the file that are read when used.

    Raises ValueError, naming the file, for a damaged one, and for one that is larger than what can be mapped into memory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors file, or cut off: {error}") from error
    except (MemoryError, RuntimeError) as error:  # safetensors' and PyTorch's, of the map
        size = path.stat().st_size
        raise ValueError(f"{path}: got {size} bytes, expected as many as can be mapped into memory: {error}") from error


def _check(path: Path, key: str, dtype: str) -> None:
    try:
        parse(key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if dtype not in FLOATS and not (dtype in INTEGERS and key.endswith(".alpha")):
        cure = "; convert it to float16 or bfloat16 with the tool that made it" * dtype.startswith("F8")
        raise ValueError(f"{path}: {key!r} has dtype {dtype}, expected one of {', '.join(FLOATS)}{cure}")
