"""Committed tables are what bench/report.py makes of the committed result files, and its arithmetic is the raw rows'."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch):
    """bench(name) imports bench/<name>.py as its own scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    names = ("report", "result_files", "predictions", "segment_predictions", "plots", "collect", "model_memory")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_the_committed_pages_are_what_the_generator_makes(bench):
    for path, text in bench("report").pages().items():
        cure = f"{path.relative_to(ROOT)} is not what the result files say; run `PYTHONPATH=. python bench/report.py`"
        assert path.read_text(encoding="utf-8") == text, cure


def test_every_result_file_is_shown_and_every_plot_exists(bench):
    files, report = bench("result_files"), bench("report")
    for folder in files.devices():
        page = report.page(folder)
        for name, data in files.load(folder).items():
            assert f"[{name}]" in page
            for stage, run in files.runs(data):
                assert all((folder / plot).exists() for plot in report.plot_names(name, stage, run)), stage


def test_the_picture_is_of_the_newest_file(bench):
    name, cases = bench("report").picture_cases(bench("report").RESULTS / bench("report").DEVICE)
    assert len(cases) >= 4
    assert name in bench("report").PICTURE.read_text(encoding="utf-8"), "run `PYTHONPATH=. python bench/report.py`"


def rows(**medians):
    common = {"op": "forward+backward", "M": 8, "K": 4, "N": 4, "R": 2, "p": 0.1, "dtype": "float32", "tflops": 1.0}
    names = {"bare": "bare frozen linear", "ours": "lora_kernels", "fused": "lora_kernels, fused blocks", "peft": "PEFT eager"}
    spread = [{"p20_us": us, "p80_us": us, "saved_bytes": 1024, "peak_bytes": 2048} for us in medians.values()]
    return [
        {**common, "variant": names[name], "median_us": us, **more}
        for (name, us), more in zip(medians.items(), spread, strict=True)
    ]


def test_a_lost_row_stays_and_is_bold(bench):
    report = bench("report")
    assert report._measured_row(rows(bare=100.0, ours=200.0, peft=100.0))[1:4] == ["2.00", "1.00", "**0.50×**"]
    assert report._measured_row(rows(bare=100.0, ours=200.0, peft=250.0))[1:4] == ["2.00", "2.50", "1.25×"]
    table = bench("tables").layer_table({"rows": rows(bare=100.0, ours=200.0, peft=100.0)})
    assert table.count("\n") == 2 + 3
    assert "| lora_kernels | 200 | 200–200 | 1 |  | 2.00 | 0.50 | 1.0 KiB | 2.0 KiB |  |" in table


def test_fused_rows_have_lines_of_their_own_in_the_table(bench, tmp_path):
    report = bench("report")
    times = {"bare": 100.0, "ours": 200.0, "fused": 125.0, "peft": 250.0}
    block = [{**row, "block": "mlp", "kv": None} for row in rows(**times)]
    model = [{**row, "model": "m", "tokens": 8, "median_s": row["median_us"], "p20_s": 1.0, "p80_s": 1.0, "tokens_per_s": 1.0,
              "held_bytes": 0} for row in rows(**times)]  # fmt: skip
    model[-1]["saved_bytes"] = 2048
    runs = {"layer": {"rows": rows(bare=1.0, ours=1.0, peft=1.0)}, "blocks": {"rows": block}, "model": {"rows": model}}
    (tmp_path / "run.json").write_text(json.dumps(runs))
    lines = [line for line in report.measured_block(tmp_path).splitlines() if ", fused blocks |" in line]
    assert lines == [
        "| mlp 4/None/4 M=8 r=2 p=0.1 float32, fused blocks | 1.25 | 2.50 | 2.00× | 1.0 KiB (1.0 KiB; 1.0 KiB) |",
        "| m, 8 tokens, r=2, p=0.1, float32, fused blocks | 1.25 | 2.50 | 2.00× | 1.0 KiB (2.0 KiB; 1.0 KiB) |",
    ]
    assert "| lora_kernels, fused blocks | 125,000.0 | 1,000.0–1,000.0 | 1 | 1.25 | 2.00 | 1.0 KiB | 1.000 | 0.500 |" in (
        bench("tables").model_table(runs["model"])
    )


def test_refusals_and_failures_are_on_the_page(bench, tmp_path):
    run = {
        "header": {"commit": "abc", "packages": {"torch": "2"}, "cpu": {"name": "A"}},
        "rows": rows(bare=1.0, ours=1.0),
        "failures": [{"case": "4→4", "reason": "y: norm error 1"}],
        "peers_not_measured": [{"peer": "bnb", "case": "all", "reason": "not installed"}],
    }
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = bench("report").page(tmp_path)
    assert "Not measured: bnb: not installed." in page
    assert "FAILED 4→4: y: norm error 1" in page


def test_the_newest_file_is_by_time_not_by_name(bench, tmp_path):
    for name, time in (("b.json", "2026-01-01T00:00:00Z"), ("a.json", "2026-01-02T00:00:00Z")):
        (tmp_path / name).write_text(json.dumps({"time": time}))
    (tmp_path / "z.json").write_text("{}")
    assert [name for name, _ in bench("result_files").newest_first(tmp_path)] == ["a.json", "b.json", "z.json"]


def test_predictions_meet_their_measurement(bench, monkeypatch, tmp_path):
    files, predictions = bench("result_files"), bench("predictions")
    row = {"variant": "project", "M": 8192, "K": 4096, "N": 4096, "R": 16, "p": 0.1, "adapter": "bfloat16", "over": 1.0}
    folder = tmp_path / "nvidia-h100-80gb-hbm3"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"kernels": {"rows": [{**row, "timing": {"median": 33e-6}}]}}))
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    line = next(line for line in predictions.page().splitlines() if line.startswith("| project 4096→4096 M=8192 r=16 p=0.1"))
    assert line.split("|")[5].strip() == "33.0"
    layer = next(found for found in predictions.predictions() if found["kernel"].startswith("layer"))
    assert 1.0 < layer["times_bare"]["H200"] < layer["times_bare"]["H100"] < 1.5


def test_predictions_of_segments_count_what_is_moved(bench):
    """Of Qwen3's experts by hand: M rows of eight of each token, stacks of 128."""
    rows = {row["kernel"]: row for row in bench("segment_predictions").segment_predictions() if row["M"] != 8192}
    M, H, inner, E = 8 * 8192, 2048, 768, 128
    of = lambda part: rows[f"Qwen3-30B-A3B experts{part}"]  # noqa: E731
    assert of(": activation")["megabytes"] == pytest.approx(2 * 8 * M * inner / 1e6), "a, e, u; da, e, u, de, du"
    stacks = 3 * inner * H * E
    assert of(": products")["megabytes"] == pytest.approx(2 * (2 * stacks + M * (6 * H + 9 * inner)) / 1e6)
    codes, rows_in = stacks * (1 / 2 + 1 / 64), M + 64 * E  # of u, where half of each last tile is empty
    decoded = 2 * (2 * H + 3 * inner) * (rows_in + 2 * M) + 2 * codes
    assert of(": products over 4 bits in the place of these")["megabytes"] == pytest.approx(decoded / 1e6)
    sums = next(row for name, row in rows.items() if "PEFT" in name and "Qwen3" in name)
    assert sums["megabytes"] == pytest.approx(2 * (5 * stacks + M * (2 * H + 3 * inner)) / 1e6)
    assert 1 < of(", forward+backward")["times_bare"]["H200"] < of(", forward+backward")["times_bare"]["H100"] < 1.5
    assert rows["population of 256, forward"]["us"]["H200"] < 0.1 * next(
        row["us"]["H200"] for name, row in rows.items() if name.endswith("made and multiplied")
    )


def test_plots_are_drawn_the_same_twice(bench, tmp_path):
    pytest.importorskip("matplotlib")
    plots = bench("plots")
    memory = [
        {"variant": "lora_kernels", "checkpointing": flag, "tokens": t, "peak_bytes": t} for flag in (0, 1) for t in (1, 2)
    ]
    for kind, run in (
        ("layer", {"rows": rows(bare=1.0, ours=2.0)}),
        ("memory", {"rows": memory, "model": "m", "R": 4, "p": 0.1}),
    ):
        first, second = tmp_path / "1.svg", tmp_path / "2.svg"
        plots.draw(kind, run, first)
        plots.draw(kind, run, second)
        assert first.read_bytes() == second.read_bytes()
        assert "lora_kernels" in first.read_text()


def test_memory_of_a_model_over_the_sequence_length(bench):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import torch

    from lora_kernels import LoRAConfig

    model_memory = bench("model_memory")
    model = model_memory.small_llama(torch.float32, torch.device("cpu"))
    found = list(model_memory.rows(model, [64], LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1), torch.device("cpu")))
    held = {(row["variant"], row["checkpointing"]): row["held_bytes"] for row in found}
    assert held["lora_kernels", False] < 0.7 * held["PEFT eager", False]  # PEFT keeps a dropped x for each layer
    fused, bare = (held[name, False] for name in ("lora_kernels, fused blocks", "bare frozen linear"))
    assert fused < bare < held["lora_kernels", False]
    assert held["lora_kernels", True] < 0.5 * held["lora_kernels", False]
    peak = {(row["variant"], row["checkpointing"]): row["peak_bytes"] for row in found}
    assert peak["lora_kernels", True] < peak["PEFT eager", True]


def test_a_second_run_of_a_commit_keeps_the_other_stages(bench):
    earlier = {"stages": [{"stage": "a"}, {"stage": "b"}], "a": 1, "b": 2, "time": 1}
    data = {"stages": [{"stage": "b"}], "time": 2}  # b failed this time, and left no result
    assert bench("collect").merged(earlier, data) == {"stages": [{"stage": "a"}, {"stage": "b"}], "a": 1, "time": 2}


def test_tables_of_loss_curves_and_of_parts(bench):
    files, tables = bench("result_files"), bench("tables")
    curve = {"model": "m", "dropout": 0.1, "peft": [3.0, 2.0], "accelerated": [3.0, 2.5], "calls": {"fast": 7}}
    run = {"steps": 2, "rows": [{**curve, "distance_of_accelerated": 0.25, "distance_of_seeds": 0.5}]}
    assert files.kind(run) == "curves"
    assert "| m, p=0.1 | 3.000, 2.000 | 2.500 | 2.5e-01 | 5.0e-01 | 7 fast |" in tables.curves_table(run)
    times = {"median": 0.002, "p20": 0.001, "p80": 0.003, "times_ours": 2.0}
    run = {"rows": [{"op": "forward", "K": 8, "N": 4, "M": 1, "dtype": "float32", "variants": {"bitsandbytes": times}}]}
    assert files.kind(run) == "parts"
    assert "| forward 8→4 M=1 float32 | bitsandbytes | 2.00 | 1.00–3.00 | 2.00 |" in tables.parts_table(run)
    ms = {name: {"median": value} for name, value in (("one by one", 8.0), ("population", 2.0), ("frozen", 1.0))}
    run = {"rows": [{"members": 64, "M": 2, "K": 8, "N": 4, "ms": ms, "ratio": 4.0, "times_frozen": 2.0}]}
    assert files.kind(run) == "populations"
    assert "| P=64 M=2 8→4 | 8.00 | 2.00 | 1.00 | 4.0 | 2.00 |" in tables.populations_table(run)
    ms = {name: {"median": value} for name, value in (("peft", 8.0), ("accelerated", 2.0))}
    run = {"rows": [{"experts": "8 of 64", "tokens": 256, "ms": ms, "ratio": 4.0}]}
    assert files.kind(run) == "experts"
    assert "| 8 of 64, 256 tokens | 8.0 | 2.0 | 4.0 |" in tables.experts_table(run)
    size = {"adapters": 16, "samples": 64, "tokens": 1, "K": 8, "N": 16}
    run = {"rows": [{**size, "ms": {**ms, "one adapter": {"median": 1.0}}, "ratio": 4.0}]}
    assert files.kind(run) == "adapters"
    assert "| 64 × 1, 8→16 | 16 | 8.00 | 2.00 | 1.00 | 4.00 |" in tables.adapters_table(run)
    run = {"rows": [{"population": 8, "rank": 1, "dtype": "float32", "fitness": [0.5, 0.9], "final": 0.95, "majority": 0.5}]}
    assert files.kind(run) == "fitness"
    assert "| rank 1, P=8, float32 | 0.50, 0.50, 0.50, 0.50, 0.90 | 0.950 | 0.500 |" in tables.fitness_table(run)
    of = {"ms": {"peft": {"median": 30.0}, "ours": {"median": 20.0}}, "saved_bytes": {"peft": 4 << 20, "ours": 2 << 20}}
    run = {"rows": [{"p": 0.1, "R": 8, "samples": 4, "channels_last": False, **of}]}
    assert files.kind(run) == "unet"
    assert "| 4 samples, r=8, p=0.1, contiguous | ours | 20 | 1.50 | 2 | 0.50 |" in tables.unet_table(run)


def test_the_page_of_a_gpu_s_run_has_its_stages_and_4_bit_rows(bench, tmp_path):
    timing = {"median": 2e-6, "p20": 1e-6, "p80": 3e-6}
    row = {"section": "product", "variant": "skinny", "M": 1, "K": 8, "N": 4, "p": 0.0, "timing": timing, "bytes": 4000}
    stages = [{"stage": "nf4", "state": "passed"}, {"stage": "bench", "state": "cut off"}]
    data = {"stages": stages, "nf4": {"rows": [{**row, "over": 0.8, "peak_bytes": 2048}]}, "tests": {"counts": {"passed": 3}}}
    (tmp_path / "run.json").write_text(json.dumps(data))
    page = bench("report").page(tmp_path)
    assert "Stages: nf4 passed, bench cut off." in page
    assert "| product skinny 8→4 M=1 p=0 | 2.0 | 1.0 | 3.0 | 2 | 0.800 | 2.0 KiB |" in page


def test_collect_names_a_cpu_by_its_cores(bench):
    environment = {"gpus": [], "cpu": {"name": "AMD EPYC", "threads": 2}, "commit": "abc"}
    run = {"machine": "cpu", "date": "2026-01-01", "environment": environment}
    path = bench("collect").target(run)
    assert path == ROOT / "bench/results/amd-epyc-2-cores/2026-01-01-abc.json"
