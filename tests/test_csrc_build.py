"""The build: what setup.py decides and packs, what the machine code needs, and how the extension behaves without a GPU."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from triton_offline import instructions

ROOT = Path(__file__).parents[1]
FAMILIES = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
KERNELS = {  # registers at most, on any GPU family: 65536 / (256 · registers) blocks of 256 threads stay on a processor
    "dequantize_words_kernel": 64,
    "dequantize_any_kernel": 64,
    "quantize_kernel": 64,
    "quantize_absmax_kernel": 64,
    "skinny_kernel": 128,
}
SHARED = 48 << 10  # bytes, what a block gets without asking


def built() -> Path:
    """The built extension, or skip."""
    library = next((ROOT / "lora_kernels").glob("_C.*.so"), None)
    return library or pytest.skip("the extension is not built: python setup.py build_ext --inplace")


# ---- setup.py ----


def setup_py(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "LORA_KERNELS_BUILD_CUDA")
    }
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**env, **environment}, check=False)


def test_without_nvcc_it_is_skipped_and_says_why(tmp_path: Path) -> None:
    result = setup_py("--version", PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "the CUDA extension is skipped: there is no nvcc, neither in CUDA_HOME nor on the PATH" in result.stdout
    result = setup_py("--version", CUDA_HOME=str(tmp_path))
    assert "is skipped: there is no nvcc" in result.stdout


def test_forced_without_nvcc_it_is_an_error(tmp_path: Path) -> None:
    for wish in ("1", "90a"):
        result = setup_py("--version", PATH=str(tmp_path), LORA_KERNELS_BUILD_CUDA=wish)
        assert result.returncode == 1
        assert f"LORA_KERNELS_BUILD_CUDA={wish}, but the CUDA extension cannot be built: there is no nvcc" in result.stderr


def test_skipped_on_request_and_unknown_families_refused() -> None:
    assert "is skipped: LORA_KERNELS_BUILD_CUDA=0" in setup_py("--version", LORA_KERNELS_BUILD_CUDA="0").stdout
    for wish, unknown in (("75;90a", "75"), ("sm_90", "sm_90"), ("90a,100", "90a,100"), ("90b", "90b"), ("80;", "")):
        result = setup_py("--version", LORA_KERNELS_BUILD_CUDA=wish)
        assert result.returncode == 1
        expected = "expected 0, 1, cu128 or another release, or GPU families from 80 on, as in 80;86;89;90a;100;120"
        assert f"LORA_KERNELS_BUILD_CUDA: got {unknown!r}, {expected}" in result.stderr


def fake_nvcc(folder: Path, release: str) -> str:
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    return str(folder)


def test_where_nvcc_is_it_is_built(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    result = setup_py("--version", CUDA_HOME=fake_nvcc(tmp_path, "13.0"))
    assert "the CUDA extension is built for sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120: nvcc 13.0 is at" in result.stdout
    result = setup_py("--version", CUDA_HOME=fake_nvcc(tmp_path, "13.0"), LORA_KERNELS_BUILD_CUDA="80;90a")
    assert "is built for sm_80, sm_90a: nvcc 13.0" in result.stdout
    for family in ("87", "103a", "120f"):  # of GPUs that a wheel reaches by those of others
        result = setup_py("--version", CUDA_HOME=fake_nvcc(tmp_path, "13.0"), LORA_KERNELS_BUILD_CUDA=family)
        assert f"is built for sm_{family}: nvcc 13.0" in result.stdout, result.stderr
    result = setup_py("--version", CUDA_HOME=fake_nvcc(tmp_path, "12.4"))
    assert "is skipped:" in result.stdout
    assert "is CUDA 12.4, and it needs 12.8 or newer" in result.stdout


def test_a_variant_names_its_release_and_takes_no_other(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("ninja")
    own = setup_py("--version", LORA_KERNELS_BUILD_CUDA="0").stdout.split()[-1]
    for release, variant in (("12.8", "cu128"), ("13.0", "cu130")):
        result = setup_py("--version", CUDA_HOME=fake_nvcc(tmp_path, release), LORA_KERNELS_BUILD_CUDA=variant)
        assert f"is built for sm_80, sm_86, sm_89, sm_90a, sm_100, sm_120: nvcc {release}" in result.stdout, result.stderr
        assert result.stdout.split()[-1] == f"{own}+{variant}"
    result = setup_py("--version", CUDA_HOME=str(tmp_path), LORA_KERNELS_BUILD_CUDA="cu128")
    assert result.returncode == 1
    assert "LORA_KERNELS_BUILD_CUDA=cu128, but the CUDA extension cannot be built" in result.stderr
    assert "nvcc is CUDA 13.0, not 12.8" in result.stderr


def test_without_a_cpp_compiler_the_rest_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    build = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    result = setup_py(*build, LORA_KERNELS_BUILD_CUDA="0", CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    assert 'building extension "lora_kernels._cpu" failed' in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_the_source_distribution_holds_what_builds_tests_and_explains_it(tmp_path: Path) -> None:
    """All that git tracks, but for git's own and pre-commit's configuration."""
    result = setup_py("-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path), LORA_KERNELS_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    sources |= {name for name in tracked if name not in (".gitignore", ".pre-commit-config.yaml")}
    assert sources | {"setup.py", "pyproject.toml"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_libraries_of_an_earlier_build_are_not_packed(tmp_path: Path) -> None:
    """Neither from the build's folder, where one is not asked for now and one fails, nor from beside the sources."""
    tree, packed = tmp_path / "tree", tmp_path / "packed"
    for name in ("csrc", "lora_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for folder in (tree / "lib/lora_kernels", tree / "lora_kernels"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("_C", "_cpu"):
            (folder / f"{name}{suffix}").write_text("stale")
    commands = ("build", "--build-lib", "lib", "install_lib", "--no-compile", "-d", str(packed))
    result = setup_py(*commands, cwd=tree, LORA_KERNELS_BUILD_CUDA="0", CC="false", CXX="false")
    assert result.returncode == 0, result.stderr
    files = {str(file.relative_to(packed)) for file in packed.rglob("*") if file.is_file()}
    sources = [file for file in (ROOT / "lora_kernels").rglob("*") if file.suffix in (".py", ".json", ".typed")]
    assert files == {str(file.relative_to(ROOT)) for file in sources}


@pytest.mark.parametrize("which", ["installed", "bundled with Python"])
def test_old_and_new_setuptools_read_the_license(which: str, tmp_path: Path) -> None:
    environment, field = {}, "License-Expression" if int(version("setuptools").split(".")[0]) >= 77 else "License"
    if which != "installed":  # Python 3.11 and older bring one of 2022
        bundled = Path(pytest.importorskip("ensurepip").__file__).parent / "_bundled"
        wheel = next(bundled.glob("setuptools-*.whl"), None) or pytest.skip("this Python brings no setuptools")
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
        environment, field = {"PYTHONPATH": str(tmp_path / "site")}, "License"
    result = setup_py("-q", "egg_info", "-e", str(tmp_path), LORA_KERNELS_BUILD_CUDA="0", **environment)
    assert result.returncode == 0, result.stderr
    assert f"\n{field}: Apache-2.0\n" in next(tmp_path.glob("*.egg-info/PKG-INFO")).read_text(encoding="utf-8")


# ---- the machine code ----


def resources(library: Path) -> list[tuple[str, str, dict[str, int]]]:
    """(family, kernel, {"REG": …, "STACK": …, "SHARED": …, "LOCAL": …}) of everything in the library."""
    triton = pytest.importorskip("triton")
    tool = shutil.which("cuobjdump") or Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", library], capture_output=True, text=True, check=True)
    rows, family, kernel = [], "", ""
    for line in (text.stdout + text.stderr).splitlines():
        if match := re.search(r"\barch = (sm_\w+)|for sm_\w+|(sm_\w+)\.cubin", line):
            family = match[1] or match[2] or family
        if match := re.search(r"Function (\w+):", line):
            kernel = next(name for name in KERNELS if name in match[1])
        if "REG:" in line:
            rows.append(
                (family, kernel, {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)})
            )
    return rows


def test_every_kernel_for_every_family_without_spills() -> None:
    rows = resources(built())
    families = {family for family, _, _ in rows}
    assert families == FAMILIES or len(families) == 1, families  # one: built for the GPU at hand
    for family in families:
        count = {kernel: sum(row[:2] == (family, kernel) for row in rows) for kernel in KERNELS}
        assert count == {
            "dequantize_words_kernel": 6, "dequantize_any_kernel": 3, "quantize_kernel": 3, "quantize_absmax_kernel": 1,
            "skinny_kernel": 8,
        }, family  # fmt: skip
    for family, kernel, need in rows:
        assert need["REG"] <= KERNELS[kernel], (family, kernel, need)
        assert need["LOCAL"] == need["STACK"] == 0, (family, kernel, need)
        assert need["SHARED"] <= SHARED, (family, kernel, need)


def test_decoding_costs_what_the_plan_counts(tmp_path: Path) -> None:
    """Instructions per weight in the skinny product's loop on sm_90: 5.4 fit under the bytes of plain absmax, 4.9 of nested."""
    library, tools = built(), Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin"
    subprocess.run([tools / "cuobjdump", "-xelf", "sm_90", library], cwd=tmp_path, check=True, capture_output=True)
    listings = [
        subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        for cubin in tmp_path.glob("*.cubin")
    ]
    parts = [part for listing in listings for part in re.split(r"\n(?=\.text\.)", listing)[1:]]
    functions = [part for part in parts if "skinny_kernel" in part[:300]]
    if not functions:
        pytest.skip("built for another GPU family alone")
    assert len(functions) == 8
    weights = 4 * 32  # of a lane in one round of the loop: DEPTH chunks, two rows of 16 codes
    for function in functions:
        few, nested = "Li8E" in function[:300], "Lb1E" in function[:300]
        assert len(instructions(function.replace("FFMA", ""))[1]) / weights <= (4.2 if few else 4.6) + 0.65 * nested


# ---- without a GPU ----


def test_it_imports_and_its_calls_raise_without_a_gpu() -> None:
    built()
    code = (
        "from lora_kernels import _C\n"
        "w = _C.Weight(16, 16, 0, 0, 0, rows=8, columns=64, blocksize=64, values=[0.0] * 16)\n"
        "bf16, calls = _C.Dtype.bf16, {}\n"
        "calls['nf4_dequantize'] = lambda: _C.nf4_dequantize(w, 16, 64, bf16, 0)\n"
        "calls['nf4_skinny'] = lambda: _C.nf4_skinny(w, 16, 64, 0, 0, 0, 16, 1, 0, 1.0, 0, bf16, bf16, 0)\n"
        "calls['nf4_quantize'] = lambda: _C.nf4_quantize(16, 64, bf16, 64, [0.0] * 16, 16, 16, 16, 0)\n"
        "calls['nf4_quantize_absmax'] = lambda: _C.nf4_quantize_absmax(16, 64, 16, 16, 16, 16, 0)\n"
        "for name, call in calls.items():\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(str(error).startswith(name + ': '), 'needs an NVIDIA GPU' in str(error))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.split() == ["True"] * 8, result.stderr


def test_linked_to_no_cuda_library() -> None:
    """The runtime is inside, and the driver is looked up when it is needed."""
    needed = subprocess.run(["ldd", built()], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed
    assert "torch" not in needed
