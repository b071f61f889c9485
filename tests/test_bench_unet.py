"""bench/unet.py and bench/unet_training.py, in small."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    return importlib.import_module


def test_a_step_beside_peft_s(bench, tmp_path):
    small = ["--channels", "8", "16", "--size", "8", "--repeats", "1", "--channels-last"]
    bench("unet").main([*small, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    assert [row["p"] for row in rows] == [0.0, 0.1]
    for row in rows:
        saved = row["saved_bytes"]
        assert saved["lora_kernels"] <= saved["peft"]
        assert row["ms"].keys() == saved.keys() == {"peft", "peft, accelerated", "lora_kernels"}
    seeds = rows[1]["saved_bytes"]["lora_kernels"] - rows[0]["saved_bytes"]["lora_kernels"]
    assert seeds == 8 * 63  # one for each layer: neither a mask nor a dropped x


def test_the_example_writes_a_grid_and_an_adapter_that_diffusers_reads(bench, tmp_path, monkeypatch, capsys):
    example = bench("unet_training")
    arguments = ["--base-steps", "2", "--steps", "2", "--sampling", "2", "--out", str(tmp_path)]
    assert example.main(arguments) == 0
    assert Image.open(tmp_path / "samples.png").size == (8 * 8 * example.SIZE, 2 * 8 * example.SIZE)
    assert any(key.endswith("conv1.lora_A.weight") for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    assert "diffusers' samples" in capsys.readouterr().out
    save = example.save_adapter

    def save_another(model, directory):
        """After which diffusers' samples are others."""
        for parameter in example.lora_parameters(model):
            example.nn.init.normal_(parameter)
        return save(model, directory)

    monkeypatch.setattr(example, "save_adapter", save_another)
    assert example.main(arguments) == 1
