"""csrc/cpu compiled for the tests, as it is or with a mistake in it; CXXFLAGS and LDFLAGS as `make sanitize` sets them."""

import atexit
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

SOURCES = Path(__file__).parents[1] / "csrc/cpu"


def compiled(folder: Path, *changes: tuple[str, str, str]) -> ModuleType:
    """The extension, for each (file, old, new) with `old` replaced once. OpenMP is not linked: torch has brought it."""
    right, objects = right_objects(), []
    for source in SOURCES.iterdir():
        text = source.read_text()
        for _, old, new in [change for change in changes if change[0] == source.name]:
            assert text.count(old) == 1, f"{source.name} holds {text.count(old)} of {old!r}"
            text = text.replace(old, new)
        (folder / source.name).write_text(text)
    files = {change[0] for change in changes}
    for source in sorted(folder.glob("*.cpp")):
        objects.append(compile_object(source, "-DFOR_EACH_CPU=") if _reads(source, files) else right / f"{source.stem}.o")
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
    """A folder with the sources as they are, compiled once."""
    pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for source in SOURCES.iterdir():
        shutil.copy(source, folder)
    for source in sorted(folder.glob("*.cpp")):
        compile_object(source)
    return folder


def compile_object(source: Path, *more: str) -> Path:
    """-DFOR_EACH_CPU=: for the least CPU alone, in a third of the time."""
    import pybind11

    include = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
    options = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Werror"]
    subprocess.run(["g++", *options, *flags("CXXFLAGS"), *more, *include, "-c", source.name], cwd=source.parent, check=True)
    return source.with_suffix(".o")


def flags(variable: str) -> list[str]:
    return os.environ.get(variable, "").split()
