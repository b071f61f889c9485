"""Faults while a file is written over an older one: killed at each operation and within a file, and a disk that is full."""

import contextlib
import ctypes
import itertools
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from savers import FILE, Saver, adapted, function, savers

from lora_kernels import save_adapter
from lora_kernels.commands.console import CommandError
from lora_kernels.models.atomic_files import ABANDONED, FINISHED, UNFINISHED

OLD, NEW = 0, 1
NAMES = list(savers(Path()))
# Python's audit events of what changes a folder; the kernel's own limit, below, stops within a file, in safetensors' code too.
OPERATIONS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}
MOST = 200  # operations of one save

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@pytest.fixture
def saver(request, tmp_path: Path) -> Saver:
    if request.param == "checkpoint":
        pytest.importorskip("transformers")
    if request.param == "plot":
        pytest.importorskip("matplotlib")
    return savers(tmp_path / "scratch")[request.param]


every_saver = pytest.mark.parametrize("saver", NAMES, indirect=True)


def in_child(work: Callable[[], object]) -> int:
    """The exit code of `work` in a process of its own: 0, 1 for an exception, a signal's as a negative number."""
    return ended(start(work))


def start(work: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before(number: int, folder: Path) -> None:
    """Kill this process before its operation of that number, of those that name something below `folder`, or no folder."""
    count = itertools.count()

    def hook(event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], str | os.PathLike):
            return
        path = Path(arguments[0])
        if (path.is_relative_to(folder) or not path.is_absolute()) and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def limit(size: int, kills: bool) -> None:
    """Let no file of this process grow beyond `size` bytes: a write that would is an error, or its end."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kills else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def both(saver: Saver, tmp_path: Path) -> list[Path]:
    """Folders with the old version and with the new one."""
    folders = [tmp_path / name for name in ("old", "new")]
    for version, folder in enumerate(folders):
        folder.mkdir()
        saver.write(folder, version)
    assert saver.read(folders[0]) != saver.read(folders[1])
    return folders


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((UNFINISHED, FINISHED)))


@every_saver
def test_killed_before_each_operation(saver, tmp_path):
    versions = both(saver, tmp_path)
    old, new = map(saver.read, versions)
    seen, states = [saver.others(folder) for folder in versions] if saver.others else [], []
    for number in range(0, MOST, saver.every):
        folder = Path(shutil.copytree(versions[OLD], tmp_path / f"at {number}"))
        code = in_child(lambda n=number, f=folder: (kill_before(n, f), saver.write(f, NEW)))
        assert code in (0, -signal.SIGKILL)
        strays = left(folder)
        assert len(strays) <= 1
        with contextlib.suppress(FileNotFoundError):
            assert saver.others is None or saver.others(folder) in seen
        found = saver.read(folder)
        if saver.one_by_one:  # no description changes: no file is missing meanwhile, for other programs neither
            assert names(versions[OLD]) <= names(folder)
        else:
            assert found in (old, new), number
        if not states or (found, strays) != states[-1]:
            saver.write(folder, NEW)
            assert saver.read(folder) == new
            assert names(folder) - set(left(folder)) == names(versions[NEW])
            assert all(name.startswith(UNFINISHED) for name in left(folder))
        states.append((found, strays))
        if code == 0:
            break
    assert states[0] == (old, [])
    assert states[-1] == (new, [])
    assert 5 < number < MOST - saver.every


@every_saver
def test_killed_within_each_file(saver, tmp_path):
    """At the first byte, the second, and halfway: nothing has changed, and the next save succeeds."""
    folders = both(saver, tmp_path)
    old, new = map(saver.read, folders)
    for size in {at for file in folders[NEW].iterdir() for at in (0, 1, file.stat().st_size // 2)}:
        folder = Path(shutil.copytree(folders[OLD], tmp_path / f"at {size}"))
        assert in_child(lambda n=size, f=folder: (limit(n, kills=True), saver.write(f, NEW))) == -signal.SIGXFSZ
        assert saver.read(folder) == old
    saver.write(folder, NEW)
    assert saver.read(folder) == new


@every_saver
def test_a_disk_that_takes_no_more(saver, tmp_path):
    """The error names the file and what to do; the old files are as they were, and nothing else is there."""
    (folder, _), (reader, writer) = both(saver, tmp_path), os.pipe()  # a file of what it says would be under the limit too
    old, before = saver.read(folder), names(folder)

    def write() -> None:
        limit(1, kills=False)
        with pytest.raises((OSError, CommandError)) as caught:
            saver.write(folder, NEW)
        os.write(writer, str(caught.value).encode())

    assert in_child(write) == 0
    os.close(writer)
    with os.fdopen(reader) as told:
        message = told.read()
    assert "File too large; nothing there was changed: make room there, or save elsewhere" in message
    assert any(f"{folder}/{name}" in message for name in [*before, "shard-0"])
    assert saver.read(folder) == old
    assert names(folder) == before


def full_disk(folder: Path) -> None:
    """A file system of 64 KiB at `folder`, in this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, own = 0x10000000, 0x20000, {"uid": os.getuid(), "gid": os.getgid()}
    if libc.unshare(new_user | new_mounts):
        os._exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    for kind, number in own.items():
        Path(f"/proc/self/{kind}_map").write_text(f"{number} {number} 1")
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=64k"):
        os._exit(77)


def test_a_disk_that_is_full(tmp_path):
    """A real one, which every kernel that lets users mount file systems of their own can show."""
    big = adapted(NEW, 0)

    def work() -> None:
        full_disk(tmp_path)
        save_adapter(adapted(OLD, 0), tmp_path)
        old = function(tmp_path)
        (tmp_path / "other").write_bytes(bytes(56 << 10))
        with pytest.raises(OSError, match=r"No space left on device; nothing there was changed: make room") as caught:
            save_adapter(big, tmp_path)
        assert caught.value.filename == str(tmp_path / "adapter_model.safetensors")
        assert function(tmp_path) == old
        (tmp_path / "other").unlink()
        save_adapter(big, tmp_path)
        assert function(tmp_path) == function(save_adapter(big, tmp_path / "new"))

    if (code := in_child(work)) == 77:
        pytest.skip("this kernel lets users mount nothing")
    assert code == 0


def killed(folder: Path, kind: str) -> Path:
    """A folder with an old adapter, in which a save of a new one was killed after, or just before, all its files were there."""
    save_adapter(adapted(OLD, OLD), folder)
    for number in range(MOST):
        if in_child(lambda n=number: (kill_before(n, folder), save_adapter(adapted(NEW, NEW), folder))) and left(folder):
            if left(folder)[-1].startswith(kind) and any((folder / left(folder)[-1]).iterdir()):
                return folder
            for name in left(folder):
                for path in (folder / name).iterdir():
                    path.unlink()
                (folder / name).rmdir()
    raise AssertionError(f"never left {kind}")


def test_what_a_killed_save_leaves_is_removed_by_one_an_hour_later(tmp_path):
    folder = killed(tmp_path / "adapter", UNFINISHED)
    (stray,) = left(folder)
    save_adapter(adapted(NEW, NEW), folder)
    assert left(folder) == [stray]  # it may be another process's, which is at it
    for path in [*(folder / stray).iterdir(), folder / stray]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - ABANDONED - 1))
    save_adapter(adapted(NEW, NEW), folder)
    assert left(folder) == []


def test_a_finished_save_does_not_replace_what_was_written_since(tmp_path):
    folder = killed(tmp_path / "adapter", FINISHED)
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # by another program, which knows nothing of it
        data = (save_adapter(adapted(OLD, OLD), tmp_path / "other") / name).read_bytes()
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)
    assert function(folder) == function(tmp_path / "other")
    assert left(folder) == []


def test_a_single_file_is_never_missing(tmp_path):
    """Read by its own path, as other tools do."""

    def write(version: int) -> None:
        save_adapter(adapted(version, version), tmp_path / FILE, format="kohya")

    write(OLD)
    for number in range(MOST):
        code = in_child(lambda n=number: (kill_before(n, tmp_path), write(NEW)))
        assert (tmp_path / FILE).is_file()
        if not code:
            return


def test_several_processes_save_in_one_place(tmp_path):
    """As all ranks do that are not told which is the first: each finishes, and finds what another has finished for it."""
    saved = [(save_adapter(adapted(v, v), tmp_path / str(v)), function(tmp_path / str(v)))[1] for v in (OLD, NEW)]

    def work(version: int) -> None:
        for _ in range(20):
            save_adapter(adapted(version, version), tmp_path)

    children = [start(lambda v=version: work(v)) for version in (OLD, NEW, OLD, NEW)]
    assert [ended(child) for child in children] == [0] * 4
    save_adapter(adapted(NEW, NEW), tmp_path)
    assert function(tmp_path) == saved[NEW]
    assert left(tmp_path) == []
