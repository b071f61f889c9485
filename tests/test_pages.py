"""The pages of `demo` and `bench --html`: the numbers of the JSON, the words of others as text, whole or not at all."""

import json
from pathlib import Path

import pytest
import tiny_llama
from html_reader import read

from lora_kernels.commands.bench import page as bench_page
from lora_kernels.commands.console import format_bytes, format_seconds
from lora_kernels.commands.demo import run as demo

for package in ("transformers", "peft", "matplotlib", "safetensors"):
    pytest.importorskip(package)

SCRIPT = '<script src="https://x.example"></script>'
LAYERS = ["bench", "--shape", "48x32", "--rank", 4, "--repeats", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """In a folder whose name would be markup."""
    return tiny_llama.write(tmp_path_factory.mktemp("model") / "<b>&amp;llama")


def test_the_demos_page(run, model, tmp_path, monkeypatch):
    text, out, target = tmp_path / "text.txt", tmp_path / "out", tmp_path / "demo.json"
    text.write_text(tiny_llama.TEXT)
    samples = iter([f"before {SCRIPT}", "after </pre>\n<h1>\udcff"])
    monkeypatch.setattr(demo, "sample", lambda *arguments: next(samples))
    options = ["--steps", 8, "--tokens-per-step", 64, "--rank", 4, "--variant", "adalora", "--json", target]
    code, _, err = run("demo", "--model", model, "--text", text, "--output", out, *options)
    assert code == 0, err
    found = json.loads(target.read_text())
    assert Path(found["page"]) == out / "report.html"
    page = read((out / "report.html").read_text(encoding="utf-8"))
    assert page.quotations == [found["prompt"], f"before {SCRIPT}", "after </pre>\n<h1>?"]
    assert f"LoRA fine-tuning of {model}" in page.text
    held_out = list(found["held_out"].values())
    assert f"went from {held_out[0]:.3f} to {held_out[-1]:.3f} nats per token" in page.text
    assert ["held out, before and after", f"{held_out[0]:.3f}", f"{held_out[-1]:.3f}"] in page.rows
    for name, measured in found["steps"].items():
        assert f"{name} {format_seconds(measured['step']['median'])}" in page.text
        assert f"{name} {format_bytes(measured['saved_bytes'])}" in page.text
    ours, peft = found["steps"]["lora_kernels"], found["steps"]["PEFT eager"]
    assert page.bars[2:] == [("ours", pytest.approx(100 * ours["saved_bytes"] / peft["saved_bytes"], abs=0.06)), ("", 100)]
    for layer, rank in found["ranks"].items():
        assert [layer, str(rank)] in page.rows
    assert ["rank", "4"] in page.rows
    assert f"{found['environment']['lora_kernels']}, commit" in page.text
    assert (page.tags.count("polyline"), page.tags.count("circle")) == (3, len(held_out))


def test_the_page_of_layers(run, tmp_path):
    json_file, html_file = tmp_path / "bench.json", tmp_path / "bench.html"
    sizes, compare = ("--tokens", 16, "--tokens", 24), ("--compare", "peft,unsloth-style")
    assert run(*LAYERS, *sizes, *compare, "--json", json_file, "--html", html_file)[0] == 1  # Unsloth's order has no dropout
    found, page = json.loads(json_file.read_text()), read(html_file.read_text(encoding="utf-8"))
    assert len(found["rows"]) == 6
    for case, rows in (
        ("48→32 M=16 r=4 p=0.1 float32", found["rows"][:3]),
        ("48→32 M=24 r=4 p=0.1 float32", found["rows"][3:]),
    ):
        assert {row["case"] for row in rows} == {case}
        assert f"forward+backward, {case} time, the median {rows[0]['variant']}" in page.text
        for row in rows:
            assert f"{row['variant']} {format_seconds(row['median_us'] * 1e-6)}, x bare {row['times_bare']:.2f}" in page.text
            assert f"{row['variant']} {format_bytes(row['saved_bytes'])}" in page.text
            assert any(cells[0] == row["variant"] and f"{row['median_us']:,.0f}" in cells for cells in page.rows)
    widths = [width for _, width in page.bars]
    slowest = max(row["median_us"] for row in found["rows"][:3])
    assert widths[:3] == pytest.approx([100 * row["median_us"] / slowest for row in found["rows"][:3]], abs=0.06)
    for refusal in found["peers_not_measured"]:
        assert [f"{refusal['peer']}, {refusal['case']}", refusal["reason"]] in page.rows
    assert ["repeats", "1"] in page.rows
    assert found["header"]["device"] in page.text


def test_the_page_of_a_model(run, model, tmp_path):
    json_file, html_file = tmp_path / "bench.json", tmp_path / "bench.html"
    options = ["--tokens", 32, "--rank", 4, "--repeats", 1, "--device", "cpu", "--json", json_file, "--html", html_file]
    code, _, err = run("bench", "--model", model, *options)
    assert code == 0, err
    found, page = json.loads(json_file.read_text()), read(html_file.read_text(encoding="utf-8"))
    assert "<b>&amp;llama, 32 tokens, r=4, p=0.1, float32 time, the median bare frozen linear" in page.text
    assert len(found["rows"]) == 5
    for row in found["rows"]:
        assert f"{row['variant']} {format_seconds(row['median_s'])}, x bare {row['times_bare']:.2f}" in page.text
        assert any(cells[0] == row["variant"] and format_bytes(row["peak_bytes"]) in cells for cells in page.rows)


def test_a_wrong_result_has_its_reason_and_no_times(run, monkeypatch, tmp_path):
    from lora_kernels.cases import linear as cases

    real = cases.lora_linear
    monkeypatch.setattr(cases, "lora_linear", lambda *arguments, **options: 1.01 * real(*arguments, **options))
    target = tmp_path / "bench.html"
    assert run(*LAYERS, "--tokens", 16, "--compare", "none", "--html", target)[0] == 1
    page = read(target.read_text(encoding="utf-8"))
    assert "No times reported: the correctness gate failed case reason 48→32 M=16 r=4 p=0.1 float32 lora_kernels:" in page.text
    assert page.bars == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "-"], "--html: got -, expected a file in an existing directory"),
        (["--html", "no/where.html"], "--html: got no/where.html, expected a file in an existing directory"),
        (["--html", "."], "--html: got ., expected a file in an existing directory"),
        (["--html", "same", "--json", "./same"], "--html: got same, which --json writes; pass another file"),
    ],
)
def test_a_target_that_cannot_be_written_is_one_line_at_once(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("bench", *arguments) == (2, "", f"lora-kernels: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_page_is_replaced_whole_or_not_at_all(run, monkeypatch, tmp_path):
    target = tmp_path / "bench.html"
    target.write_text("the old one")

    def full(path, *arguments, **options):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench_page, "bench_page", lambda result: "the new one")
    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(*LAYERS, "--tokens", 16, "--compare", "none", "--html", target)
    assert code == 1
    assert err.splitlines()[-1].startswith(
        f"lora-kernels: --html: cannot write {target}: No space left on device; nothing there"
    )
    assert target.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [target]
