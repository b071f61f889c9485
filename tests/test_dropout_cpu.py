"""csrc/dropout.cpp, compiled here from its source: the bits of dropout.py's operations, for any slice, dtype and threads."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_kernels import backend_report, dropout, dropout_mask, lora_linear
from lora_kernels.dropout import KeepRows

SOURCE = Path(__file__).parents[1] / "csrc/dropout.cpp"
SEED = -0x0123456789ABCDEF


def compiled(folder: Path, old: str = "", new: str = "") -> ModuleType:
    """The extension, with `old` in its source replaced once. OpenMP is not linked: torch has brought it."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    text = SOURCE.read_text()
    assert not old or text.count(old) == 1, f"{SOURCE.name} holds {text.count(old)} of {old!r}"
    (folder / "dropout.cpp").write_text(text.replace(old, new) if old else text)
    include = ["-I", sysconfig.get_path("include"), "-I", pybind11.get_include()]
    options = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Werror"]
    subprocess.run(["g++", *options, *include, "-c", "dropout.cpp", "-o", "dropout.o"], cwd=folder, check=True)
    subprocess.run(["g++", "-shared", "dropout.o", "-o", "_cpu.so"], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location(f"{folder.name}._cpu", folder / "_cpu.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return compiled(tmp_path_factory.mktemp("right"))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def by_operations(monkeypatch: pytest.MonkeyPatch, keep_rows: KeepRows, rows: slice) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(dropout, "cpu_extension", None)
        return keep_rows(rows).clone()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 7, 511, 512, 513, 2000])
@pytest.mark.parametrize(("first", "M"), [(0, 0), (0, 1), (3, 33), (2**32 - 40, 40)])
@pytest.mark.parametrize("count", [1, 2])
def test_the_bits_of_the_operations(extension, threads, monkeypatch, dtype, K, first, M, count):
    torch.set_num_threads(count)
    monkeypatch.setattr(dropout, "cpu_extension", extension)
    for p, offset in ((0.1, 0), (0.77, 2**64 - 3), (1.0, 5), (0.0, 1 << 32)):
        keep_rows = KeepRows(K, p, torch.tensor(SEED), offset=offset, dtype=dtype)
        rows = slice(first, first + M)
        want = by_operations(monkeypatch, keep_rows, rows)
        got = keep_rows(rows)
        assert got.dtype == dtype
        assert torch.equal(got, want)


MISTAKES = {
    "a round too few": ("ROUNDS = 7", "ROUNDS = 6"),
    "multipliers swapped": ("M0 = 0xD2511F53, M1 = 0xCD9E8D57", "M0 = 0xCD9E8D57, M1 = 0xD2511F53"),
    "the threshold itself is dropped": ("(words[i] >> 16) >= mask", "(words[i] >> 16) > mask"),
    "an odd lane over its even one": ("kept[2 * i + 1] =", "kept[2 * i] ="),
    "offset's halves swapped": ("c2 = mask.offset[0], c3 = mask.offset[1]", "c2 = mask.offset[1], c3 = mask.offset[0]"),
    "each tile is the first": ("philox(static_cast<std::uint32_t>(k / LANES)", "philox(static_cast<std::uint32_t>(0)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(dropout, "cpu_extension", compiled(tmp_path, *MISTAKES[mistake]))
    seed, rows = torch.tensor(SEED), slice(0, 300)
    keep_rows = KeepRows(1100, 0.1, seed, offset=7)
    assert not torch.equal(keep_rows(rows).clone(), by_operations(monkeypatch, keep_rows, rows))


def test_a_layer_computes_with_it(extension, monkeypatch):
    """The same seed, the same output and gradients, bit for bit."""

    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, A, B = (torch.randn(shape, requires_grad=True) for shape in ((33, 70), (8, 70), (40, 8)))
        y = lora_linear(x, torch.randn(40, 70), A, B, scaling=2.0, dropout_p=0.3, seed=11)
        return [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]

    monkeypatch.setattr(dropout, "cpu_extension", None)
    want = results()
    calls = []
    monkeypatch.setattr(dropout, "cpu_extension", extension)
    keep_rows = extension.keep_rows
    monkeypatch.setattr(extension, "keep_rows", lambda *args: (calls.append(args), keep_rows(*args)))
    assert all(map(torch.equal, results(), want))
    assert len(calls) == 2


def test_where_it_is_not_built_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(dropout, "cpu_extension", None)
    monkeypatch.setattr(dropout, "why_no_cpu_extension", "csrc/dropout.cpp was not built")
    assert dropout_mask(2, 9, 0.5, 0).shape == (2, 9)
    used = next(row for row in backend_report(x=torch.ones(2, 2), weight=torch.ones(2, 2)) if row.used)
    assert used.backend == "torch"
    assert re.search("masks are PyTorch operations: csrc/dropout.cpp was not built", used.reason)


def test_bad_itemsize(extension):
    out = torch.empty(2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="itemsize of 2, expected 1"):
        extension.keep_rows(out.data_ptr(), 2, 0, 2, 8, 100, 0, 0, 1)
