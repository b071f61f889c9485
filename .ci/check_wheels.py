"""What is given away, before it is: python .ci/check_wheels.py FILE... [--all]

Of each wheel: it is for one Python, as pybind11's modules are, the CPU extension is in it, the CUDA one where its version
names a variant and only there, and no library of others: torch brings OpenMP's, and the CUDA runtime is inside. Of the source
distribution: that it has the sources. --all: also that none is missing, for each Python, machine and variant.
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

PYTHONS = ("310", "311", "312", "313", "314")
VARIANTS = {"x86_64": ("", "+cu128", "+cu130"), "aarch64": ("",)}
WHEEL = re.compile(
    r"lora_kernels-(?P<version>[\d.]+)(?P<variant>\+cu\d+)?-cp(?P<python>\d+)-cp(?P=python)-(?P<platform>\w+)\.whl"
)
PLATFORM = re.compile(r"(?:linux|manylinux_2_(?P<minor>\d+))_(?P<machine>x86_64|aarch64)")  # linux: as built, before auditwheel


def check_wheel(path: Path) -> tuple[str, str, str]:
    """(Python, machine, variant). Raises ValueError that names the file."""
    found = WHEEL.fullmatch(path.name)
    platforms = [PLATFORM.fullmatch(tag) for tag in re.split(r"\.(?=(?:many)?linux)", found["platform"])] if found else []
    if not found or not all(platforms):
        raise ValueError(f"{path}: expected lora_kernels-VERSION[+cuXYZ]-cpN-cpN-manylinux_2_28_MACHINE.whl")
    machine, variant = platforms[0]["machine"], found["variant"] or ""
    if any(int(tag["minor"] or 0) > 28 for tag in platforms):
        raise ValueError(f"{path}: needs a newer glibc than 2.28; build it in cibuildwheel's image")
    libraries = {name for name in zipfile.ZipFile(path).namelist() if re.search(r"\.so(\.|$)", name)}
    suffix = f".cpython-{found['python']}-{machine}-linux-gnu.so"
    expected = {f"lora_kernels/{name}{suffix}" for name in (("_C", "_cpu") if variant else ("_cpu",))}
    if libraries != expected:
        raise ValueError(f"{path}: got {sorted(libraries)}, expected {sorted(expected)}")
    return found["python"], machine, variant


def check_sources(path: Path) -> None:
    """Raises ValueError for a source distribution from which no wheel can be built or tested."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "LICENSE", "csrc/bindings.cpp", "csrc/cpu/cpu.h", "tests/smoke.py", "docs/index.md"}
    if missing := needed - names:
        raise ValueError(f"{path}: lacks {sorted(missing)}")


def main() -> int:
    """Print what each file is; the exit code."""
    paths = [Path(argument) for argument in sys.argv[1:] if argument != "--all"]
    seen = set()
    for path in paths:
        if path.suffix == ".whl":
            seen.add(check_wheel(path))
        else:
            check_sources(path)
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")
    every = {(python, machine, variant) for python in PYTHONS for machine, of in VARIANTS.items() for variant in of}
    if "--all" in sys.argv and seen != every:
        raise ValueError(f"missing: {sorted(every - seen)}; not expected: {sorted(seen - every)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
