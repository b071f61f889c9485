"""Files that appear together, complete or not at all, also where the process is killed or the disk is full.

They are written into a hidden folder beside their places. Its renaming is the moment from which the new files count: whoever
saves or loads there next moves what a killed process left behind. Before that moment nothing was touched, and the folder is
harmless.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from torch import Tensor

UNFINISHED, FINISHED = ".lora_kernels-unfinished-", ".lora_kernels-finished-"
ABANDONED = 3600  # seconds without a change: no save takes as long between two of its writes
INDEX = ".index.json"  # names the files that a model is divided into
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def all_or_nothing(directory: Path) -> Iterator[Path]:
    """A new folder to write files into: they are moved to `directory` when the block ends, and removed if it raises.

    Files of the same name are replaced; .json files, which describe others, are moved last. Raises OSError that names the file,
    and what to do, where it cannot be written: `directory` is then as it was.
    """
    name = uuid4().hex[:8]
    folder = directory / f"{UNFINISHED}{name}"  # in `directory`, because renaming works within one file system
    finished = directory / f"{FINISHED}{name}"
    try:
        folder.mkdir(parents=True)
        settle(directory)
        yield folder
        _sync(folder)
        folder.rename(finished)
    except OSError as error:
        ours = error.filename is not None and str(error.filename).startswith(str(folder))
        if not ours and error.errno not in FULL:  # of what is read inside the block
            raise
        raise _explained(error, folder) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _move(finished)


def settle(directory: Path) -> None:
    """Move the files of a save that was killed when all were complete; remove what another has left an hour ago or earlier."""
    for folder in directory.glob(f"{FINISHED}*"):
        with contextlib.suppress(FileNotFoundError):
            places = {file: directory / file.name for file in folder.iterdir()}
            if any(place.exists() and _changed(place) > _changed(file) for file, place in places.items()):
                shutil.rmtree(folder, ignore_errors=True)  # another program has written there since
            else:
                _move(folder)
    for folder in directory.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(FileNotFoundError):  # it is alive, and has just ended
            if time.time() - max(_changed(path) for path in (folder, *folder.iterdir())) > ABANDONED:
                shutil.rmtree(folder, ignore_errors=True)


def write_tensors(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> None:
    """safetensors' save_file, with what the disk refuses as an OSError that names the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata=header)
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _sync(folder: Path) -> None:
    """Have the files on the disk, with the mode that the umask leaves; safetensors' are for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        file.chmod(mode)
        with file.open("r+b") as written:
            os.fsync(written.fileno())


def _move(finished: Path) -> None:
    """Move complete files to their places. Another process may do the same at the same time.

    Of several, a description that changes is removed first: between the moves other readers find none, and never the old one of
    new tensors.
    """
    files: list[Path] = []
    with contextlib.suppress(FileNotFoundError):
        files = sorted(finished.iterdir(), key=lambda file: (file.suffix == ".json", file.name))
    for file in files if len(files) > 1 else ():
        old = finished.parent / file.name
        with contextlib.suppress(FileNotFoundError):
            if file.suffix == ".json" and (file.name.endswith(INDEX) or file.read_bytes() != old.read_bytes()):
                old.unlink()
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            file.replace(finished.parent / file.name)
    shutil.rmtree(finished, ignore_errors=True)


def _explained(error: OSError, folder: Path) -> OSError:
    """`error` with the name that the file was to get, and the cure."""
    if error.filename is not None:
        file = Path(error.filename)
    else:  # what a write raises does not say where: it is the last that was begun
        file = max(folder.iterdir(), key=_changed, default=folder)
    target = folder.parent if file == folder else folder.parent / file.name
    cure = "make room there" if error.errno in FULL else "make it writable"
    return OSError(error.errno, f"{error.strerror}; nothing there was changed: {cure}, or save elsewhere", str(target))
