"""bench/nf4_gpu.py runs: every variant is checked, timed and written."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lora_kernels.plan import load


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nf4_gpu", Path(__file__).parents[1] / "bench/nf4_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_writes_every_section(
    cuda: ModuleType, bench: ModuleType, device: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.QUICK["cuda"] = bench.QUICK["cpu"]
    file = tmp_path / "rows.json"
    assert bench.main(["--quick", "--repeats", "2", "--device", device.type, "--json", str(file)]) == 0
    assert "FAILED" not in capsys.readouterr().out
    found = {(row["section"], row["variant"]) for row in json.loads(file.read_text())["rows"]}
    assert found >= {("dequantise", f"{name} {kind}") for name in ("cuda", "triton") for kind in ("nested", "plain")}
    assert found >= {("product", name) for name in ("bare dense", "skinny", "skinny, h given", "loop, h given", "scratch")}
    assert found >= {("training", name) for name in ("bare dense", "lora dense", "lora 4-bit")}


def test_wrong_values_are_not_timed(
    cuda: ModuleType,
    bench: ModuleType,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernels = load("cuda", "nf4")
    right = kernels.dequantize

    def one_bit_off(w, out: torch.Tensor) -> None:
        right(w, out)
        out.view(torch.int16)[0, 0] ^= 1

    monkeypatch.setattr(kernels, "dequantize", one_bit_off)
    rows = list(bench.dequantise_rows(64, 16, {"cuda": cuda}, device, 2))
    assert not [row for row in rows if row.variant.startswith("cuda")]
    assert "FAILED, not timed: cuda nested" in capsys.readouterr().out
    monkeypatch.undo()
    skinny = cuda.skinny
    monkeypatch.setattr(cuda, "skinny", lambda *args: skinny(*args) * 1.02)
    rows = list(bench.product_rows(64, 16, (4,), bench.available(), device, 2))
    assert "skinny" not in {row.variant for row in rows}
