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
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_kernels import NF4Weight, use_backend
from lora_kernels.functional.nf4 import quantize
from lora_kernels.plan import load

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "tests/cuda_emulator"
BUILD = ROOT / "build/emulator"


@cache
def emulated(replace: tuple[str, str, str] | None = None) -> ModuleType:
    """lora_kernels._C on CPU addresses; the calling test is skipped where there is no C++ compiler or no pybind11."""
    library = compiled(replace)  # pybind11 gives a module of the same name out again, so each has its own
    spec = importlib.util.spec_from_file_location(f"emulated_{library.stem}._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.emulated = True
    return module


@pytest.fixture(scope="module")
def cuda(device: torch.device) -> Iterator[ModuleType]:
    """lora_kernels.backends.cuda.linear: over the built extension on a GPU, over the emulated one on a CPU, never crosswise."""
    pytest.importorskip("triton")
    package = "lora_kernels.backends.cuda"
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setitem(sys.modules, "lora_kernels._C", emulated())
            _forget(package)
        module = load("cuda", "linear")
        if device.type == "cuda" and isinstance(module, str):
            pytest.skip(module)
        assert isinstance(module, ModuleType), module
        yield module
    if device.type == "cpu":
        _forget(package)


def _forget(package: str) -> None:
    """Import the backend anew when it is asked for next."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    load.cache_clear()


def quantised(values: torch.Tensor, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """`values` in 4 bits, by the CUDA backend."""
    with use_backend("cuda"):
        return quantize(values, quant_type, blocksize, double_quant)


def dequantised(w: NF4Weight, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """W by the CUDA backend."""
    with use_backend("cuda"):
        return w.dequantize(dtype, out)


def compiled(replace: tuple[str, str, str] | None = None) -> Path:
    """The shared library of the sources, built once per content. replace: (file, old, new) for a deliberately wrong one."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    texts = {file.name: file.read_text() for file in sorted((ROOT / "csrc").iterdir()) if file.is_file()}
    if replace is not None:
        name, old, new = replace
        assert texts[name].count(old) == 1, f"{name} holds {texts[name].count(old)} of {old!r}"
        texts[name] = texts[name].replace(old, new)
    options = ["-fPIC", "-O1", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-w", "-I", str(HEADERS)]
    options += ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
    device_headers = [text for name, text in texts.items() if name.endswith((".cuh", ".h"))]
    device_headers += [file.read_text() for file in sorted(HEADERS.iterdir())]
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = []
        for name in (name for name in texts if name.endswith((".cu", ".cpp"))):
            headers = (
                [texts["nf4.h"]] if name.endswith(".cpp") else device_headers
            )  # bindings take the longest, and need little
            folder = BUILD / _key(name, texts[name], *headers, *options, sys.version)
            objects.append(str(folder / "object.o"))
            if not Path(objects[-1]).exists():
                _compile(folder, name, texts, options)
        library = BUILD / f"{_key(*objects)}.so"
        if not library.exists():
            subprocess.run(["g++", "-shared", *objects, "-o", f"{library}.partial"], check=True)
            Path(f"{library}.partial").rename(library)
    return library


def _compile(folder: Path, name: str, texts: dict[str, str], options: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for other, text in texts.items():
        (folder / other).write_text(text)
    subprocess.run(["g++", *options, "-x", "c++", "-c", str(folder / name), "-o", str(folder / "partial.o")], check=True)
    (folder / "partial.o").rename(folder / "object.o")


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
