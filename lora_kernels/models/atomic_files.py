"""Files that appear together, complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


@contextlib.contextmanager
def all_or_nothing(directory: Path) -> Iterator[Path]:
    """A new folder to write files into: they are moved to `directory` when the block ends, and removed if it raises.

    Files of the same name are replaced; .json files, which describe others, are moved last.
    """
    folder = directory / f".unfinished-{uuid4().hex[:8]}"  # in `directory`, because renaming works within one file system
    folder.mkdir(parents=True)
    try:
        yield folder
        files = sorted(folder.iterdir(), key=lambda file: (file.suffix == ".json", file.name))
        mode = folder.stat().st_mode & 0o666  # what the umask leaves; safetensors' files are for their owner alone
        for file in files:
            file.chmod(mode)
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        for file in files:
            file.replace(directory / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
