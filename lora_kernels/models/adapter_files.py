"""An adapter's two files, adapter_config.json and adapter_model.safetensors: read with clear errors, written atomically."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors on the CPU) of the adapter in `directory`.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else "no such directory"
            pickled = "; adapter_model.bin is a pickle, which is not read: save it as safetensors" * (
                "adapter_model.bin" in found
            )
            raise FileNotFoundError(f"{directory}: {name} is missing; found {found}{pickled}")
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG_FILE}: not JSON, or cut off: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{directory / CONFIG_FILE}: got a {type(config).__name__}, expected an object")
    try:
        return config, load_file(directory / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS_FILE}: no safetensors file, or cut off: {error}") from error


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files, complete or not at all: written under other names, flushed to disk, then renamed."""
    from safetensors.torch import save

    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    contents = {WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}), CONFIG_FILE: text.encode()}
    with contextlib.ExitStack() as stack:
        written = {name: stack.enter_context(_temporary(directory, content)) for name, content in contents.items()}
        for name, path in written.items():
            path.replace(directory / name)


@contextlib.contextmanager
def _temporary(directory: Path, content: bytes) -> Iterator[Path]:
    """A file in `directory` with `content` on disk, removed at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=".adapter-", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's is for its owner alone
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
