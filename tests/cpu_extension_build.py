"""csrc/cpu compiled for the tests, as it is or with a mistake in it; CXXFLAGS and LDFLAGS as `make sanitize` sets them."""

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

SOURCES = Path(__file__).parents[1] / "csrc/cpu"
BUILD = Path(__file__).parents[1] / "build/csrc-cpu-tests"


def compiled(folder: Path, *changes: tuple[str, str, str], optimize: str = "-O0") -> ModuleType:
    """The extension, for each (file, old, new) with `old` replaced once. OpenMP is not linked: torch has brought it.

    optimize: how what is changed is compiled; -O0, for a mistake that a few calls show, in half the time.
    """
    right, objects = right_objects(), []
    for source in SOURCES.iterdir():
        text = source.read_text()
        for _, old, new in [change for change in changes if change[0] == source.name]:
            assert text.count(old) == 1, f"{source.name} holds {text.count(old)} of {old!r}"
            text = text.replace(old, new)
        (folder / source.name).write_text(text)
    files = {change[0] for change in changes}
    for source in sorted(folder.glob("*.cpp")):
        objects.append(
            compile_object(source, optimize, "-DFOR_EACH_CPU=") if _reads(source, files) else right / f"{source.stem}.o"
        )
    subprocess.run(["g++", "-shared", *flags("LDFLAGS"), *objects, "-o", "_cpu.so"], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cpu", folder / "_cpu.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reads(source: Path, files: set[str]) -> bool:
    """Whether a source is one of the files, or includes one, be it through another header."""
    included = re.findall(r'#include "(.+)"', source.read_text())
    return source.name in files or any(_reads(source.with_name(name), files) for name in included)


@functools.cache
def right_objects() -> Path:
    """A folder with the sources as they are, compiled once for all test processes."""
    pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    texts = [source.read_text() for source in sorted(SOURCES.iterdir())]
    key = hashlib.sha256("\0".join([*texts, *flags("CXXFLAGS"), sys.version]).encode()).hexdigest()[:16]
    BUILD.mkdir(parents=True, exist_ok=True)
    folder = BUILD / key
    with open(BUILD / "lock", "w") as lock:  # one of the test processes compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = Path(shutil.copytree(SOURCES, BUILD / f"{key}.partial", dirs_exist_ok=True))
            running = [start_compiling(source) for source in sorted(partial.glob("*.cpp"))]
            codes = [process.wait() for process in running]
            assert not any(codes)
            partial.rename(folder)
    return folder


def compile_object(source: Path, *more: str) -> Path:
    assert start_compiling(source, *more).wait() == 0
    return source.with_suffix(".o")


def start_compiling(source: Path, *more: str) -> subprocess.Popen:
    """-DFOR_EACH_CPU=: for the least CPU alone, in a third of the time."""
    import pybind11

    include = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
    options = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror"]
    return subprocess.Popen(["g++", *options, *flags("CXXFLAGS"), *more, *include, "-c", source.name], cwd=source.parent)


def flags(variable: str) -> list[str]:
    return os.environ.get(variable, "").split()
