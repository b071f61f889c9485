"""The two extensions, the version and the license; everything else about the package is in pyproject.toml.

lora_kernels._cpu, loops on a CPU (csrc/cpu), is built where a C++ compiler is, and left out where that fails.
lora_kernels._C, the CUDA kernels, is built where nvcc is (in CUDA_HOME, or on the PATH), and the decision is printed.
LORA_KERNELS_BUILD_CUDA changes it: "0" skips them, "1" makes a missing nvcc an error, and GPU families, as in "80;90a", force
them for those alone: any that nvcc knows, such as the one of the GPU at hand, which builds in a few seconds. "cu128" is for
wheels that are given away: as "1", with an nvcc of that release, which the version then names, 0.2.0+cu128.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ENVIRONMENT_VARIABLE = "LORA_KERNELS_BUILD_CUDA"
FAMILIES = ("80", "86", "89", "90a", "100", "120")  # the first also as PTX, for all GPUs between and after them
FAMILY = re.compile(r"[89]\d[af]?|1\d\d[af]?")  # compute capability 8.0 and newer
VARIANT = re.compile(r"cu(\d+)(\d)")  # CUDA's release, 12.8
CSRC = Path("csrc")
CUDA, CPU = "lora_kernels._C", "lora_kernels._cpu"
FLAGS = ["-O3", "-std=c++17", "--compiler-options", "-fPIC,-fvisibility=hidden"]
CPU_FLAGS = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=off", "-fno-trapping-math"]
CPU_FLAGS += ["-fopenmp"] if sys.platform.startswith("linux") else []
CPU_FLAGS += os.environ.get("CXXFLAGS", "").split()  # the last word, for `make sanitize`


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(str(Path(home) / "bin" / "nvcc")) if home else shutil.which("nvcc")


def release(nvcc: str) -> tuple[int, ...]:
    """The version of nvcc, (13, 0)."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in re.search(r"release (\d+)\.(\d+)", text).groups())


def missing() -> str | None:
    """What the build needs and this machine lacks."""
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    if (nvcc := find_nvcc()) is None:
        return "there is no nvcc, neither in CUDA_HOME nor on the PATH"
    if (found := release(nvcc)) < (12, 8):
        return f"{nvcc} is CUDA {found[0]}.{found[1]}, and it needs 12.8 or newer"
    for module in ("pybind11", "ninja"):
        try:
            __import__(module)
        except ImportError:
            return f"the Python package {module!r} is not installed"
    return None


def other_release(variant: re.Match) -> str | None:
    """Why nvcc builds no such variant."""
    found = release(find_nvcc())
    asked = tuple(int(part) for part in variant.groups())
    return None if found == asked else f"{find_nvcc()} is CUDA {found[0]}.{found[1]}, not {asked[0]}.{asked[1]}"


def version() -> str:
    """The package's, and the variant's name as its local part: an index takes none of those, and pip prefers them."""
    own = re.search(r'^__version__ = "(.+)"$', Path("lora_kernels/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    wish = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    return own[1] + (f"+{wish}" if VARIANT.fullmatch(wish) else "")


def decide() -> tuple[str, ...]:
    """The GPU families to build for, none to skip the extension; says why, and raises where it is forced but impossible."""
    wish = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
    variant = VARIANT.fullmatch(wish)
    families = FAMILIES if variant or wish in ("", "0", "1") else tuple(wish.split(";"))
    if unknown := [family for family in families if not FAMILY.fullmatch(family)]:
        expected = f"0, 1, cu128 or another release, or GPU families from 80 on, as in {';'.join(FAMILIES)}"
        raise SystemExit(f"{ENVIRONMENT_VARIABLE}: got {unknown[0]!r}, expected {expected}")
    if wish == "0":
        families, why = (), f"{ENVIRONMENT_VARIABLE}=0"
    elif reason := missing() or (variant and other_release(variant)):
        if wish:
            raise SystemExit(f"lora_kernels: {ENVIRONMENT_VARIABLE}={wish}, but the CUDA extension cannot be built: {reason}")
        families, why = (), reason
    else:
        why = f"nvcc {'.'.join(map(str, release(find_nvcc())))} is at {find_nvcc()}; {ENVIRONMENT_VARIABLE}=0 skips it"
    verb = f"built for sm_{', sm_'.join(families)}" if families else "skipped"
    print(f"lora_kernels: the CUDA extension is {verb}: {why}", flush=True)
    return families


def ninja_file(families: tuple[str, ...], target: Path) -> str:
    """build.ninja: an object per source, and the shared library of them with the CUDA runtime inside."""
    import pybind11

    root = Path(__file__).resolve().parent / CSRC
    gencode = [f"-gencode=arch=compute_{f},code=sm_{f}" for f in families]
    if FAMILIES[0] in families:
        gencode.append(f"-gencode=arch=compute_{FAMILIES[0]},code=compute_{FAMILIES[0]}")
    python = f"-isystem {sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    lines = [
        f"nvcc = {find_nvcc()}",
        "rule cuda",
        f"  command = $nvcc {' '.join(FLAGS + gencode)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule cpp",
        f"  command = $nvcc {' '.join(FLAGS)} {python} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        "  command = $nvcc -shared --no-device-link --cudart static --compiler-options -s $in -o $out",
    ]
    objects = []
    for source in sorted(root.glob("*.cu")) + sorted(root.glob("*.cpp")):
        objects.append(f"{source.name}.o")
        lines.append(f"build {objects[-1]}: {'cuda' if source.suffix == '.cu' else 'cpp'} {source}")
    lines.append(f"build {target.resolve()}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class Build(build_ext):
    """For _C runs ninja over csrc: setuptools knows no CUDA, and its own compiler no dependencies."""

    def run(self) -> None:
        # What an earlier build left here would go into the wheel, although it is not asked for or fails now.
        for name in (CUDA, CPU):
            for library in Path(self.build_lib).glob(f"{name.replace('.', '/')}.*"):
                library.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA:
            return super().build_extension(ext)
        folder = Path(self.build_temp).resolve() / "csrc"
        target = Path(self.get_ext_fullpath(ext.name))
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(FAMILIES_TO_BUILD, target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)


def extensions() -> list[Extension]:
    found = []
    try:
        from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
    except ImportError:
        print(f"lora_kernels: {CPU} is skipped: the Python package 'pybind11' is not installed", flush=True)
    else:
        ParallelCompile(default=0).install()  # a processor each: one alone takes a minute
        found.append(
            Pybind11Extension(
                CPU,
                [str(path) for path in sorted((CSRC / "cpu").glob("*.cpp"))],
                depends=[str(path) for path in sorted((CSRC / "cpu").glob("*.h"))],
                cxx_std=17,
                extra_compile_args=CPU_FLAGS,
                optional=True,
            )
        )
    if FAMILIES_TO_BUILD:
        found.append(Extension(CUDA, [str(path) for path in sorted(CSRC.iterdir()) if path.is_file()]))
    return found


FAMILIES_TO_BUILD = decide()
LICENSE = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setup(version=version(), ext_modules=extensions(), cmdclass={"build_ext": Build}, **{LICENSE: "Apache-2.0"})
