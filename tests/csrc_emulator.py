"""csrc/ compiled for a CPU: the kernels' own source, with tests/cuda_emulator in place of CUDA's headers.

What it shows is everything that is index arithmetic or rounding: which lane holds what, which address is read, each bit of a
result. What it cannot show: races that turns of threads hide, alignment faults, speed.
"""

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "tests/cuda_emulator"
SOURCES = sorted([*(ROOT / "csrc").glob("*.cu"), *(ROOT / "csrc").glob("*.cpp")])


@cache
def emulated() -> ModuleType:
    """lora_kernels._C on CPU addresses; the calling test is skipped where there is no C++ compiler or no pybind11."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    path = compiled(ROOT / "build/emulator", ["-I", pybind11.get_include()])
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.emulated = True
    return module


def compiled(folder: Path, options: list[str], replace: tuple[str, str, str] | None = None) -> Path:
    """The shared library of the sources, built once per content. replace: (file, old, new) for a deliberately wrong one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted([*(ROOT / "csrc").iterdir(), *HEADERS.iterdir()])
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files) + repr((replace, sys.version)).encode()).hexdigest()[:16]
    source, target = folder / key / "csrc", folder / key / "_C.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        shutil.rmtree(folder / key, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", source)
        if replace is not None:
            name, old, new = replace
            text = (source / name).read_text()
            assert text.count(old) == 1, f"{name} holds {text.count(old)} of {old!r}"
            (source / name).write_text(text.replace(old, new))
        command = ["g++", "-shared", "-fPIC", "-O1", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-w"]
        command += ["-I", str(HEADERS), "-I", sysconfig.get_path("include"), *options, "-x", "c++"]
        partial = target.with_suffix(".partial")
        subprocess.run([*command, *(str(source / file.name) for file in SOURCES), "-o", str(partial)], check=True)
        partial.rename(target)
    return target
