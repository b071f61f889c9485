"""The command line as a user meets it: exit codes, one-line errors, and JSON that has stdout to itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels import __version__, cli
from lora_kernels.commands import environment


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of main()."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora-kernels", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        else:
            code = 0
        return code, *capsys.readouterr()

    return call


def assert_one_line_error(result, *parts):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    for part in ("lora-kernels: ", *parts):
        assert part in err


def test_python_dash_m_prints_the_version():
    command = [sys.executable, "-m", "lora_kernels", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"lora_kernels {__version__}\n")


def test_importing_the_command_line_stays_light():
    heavy = "'transformers', 'peft', 'matplotlib', 'safetensors', 'gguf'"
    code = f"import sys, lora_kernels.cli; print([name for name in ({heavy}) if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_the_commit_is_that_of_the_checkout():
    root = Path(cli.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        pytest.skip("the package does not run from a checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10).stdout.strip()
    assert head
    assert head.startswith(environment.commit().removesuffix("-dirty"))


def test_report_gives_every_backend_a_reason(run):
    code, out, err = run("report", "--json", "-")
    assert code == 0
    found = json.loads(out)
    assert {row["backend"] for row in found["backends"]} == {"cuda", "triton", "torch"}
    assert all(row["reason"] for row in found["backends"])
    used = [row for row in found["backends"] if row["device"] == "cpu" and row["used"]]
    assert [row["backend"] for row in used] == ["torch", "torch"]  # float32 and bfloat16
    assert found["packages"]["torch"] in err
    assert "native" in err


def test_memory_of_shapes_writes_json_to_a_file(run, tmp_path):
    target = tmp_path / "memory.json"
    code, out, _ = run("memory", "--shape", "64x32:3", "--rank", 4, "--tokens", 10, "--json", target)
    assert code == 0
    assert "64 → 32" in out
    found = json.loads(target.read_text())
    assert found["lora"]["trainable_parameters"] == 3 * 4 * 96
    assert found["lora"]["saved_activations"] == 3 * (10 * 4 * 4 + 8)
    assert "Not counted" in found["counted"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["memory"], ["expected --model DIR, --size or --shape"]),
        (["memory", "--shape", "4x4", "--model", "x"], ["one of the three"]),
        (["memory", "--size", "9b"], ["--size: got '9b', expected 7b, 8b, 70b"]),
        (["memory", "--size", "8b", "--rank", "1025"], ["--rank: got 1025", "1 to 1024"]),
        (["memory", "--shape", "4by4"], ["--shape: got '4by4'", "expected KxN"]),
        (["memory", "--shape", "64x32", "--rank", "33"], ["--rank: got 33", "1 to 32"]),
        (["memory", "--shape", "64x32", "--dropout", "2"], ["--dropout: got 2.0"]),
        (["memory", "--shape", "64x32", "--tokens", "0"], ["--tokens: got 0"]),
        (["memory", "--shape", "64x32", "--dtype", "int8"], ["--dtype: got 'int8'", "bfloat16"]),
        (["memory", "--model", "/no/such/model"], ["--model: got /no/such/model", "does not exist"]),
        (["bench", "--suite", "huge"], ["--suite: got 'huge'", "small, smollm, llama"]),
        (["bench", "--compare", "pefd"], ["--compare: got 'pefd'", "unsloth-style"]),
        (["bench", "--repeats", "0"], ["--repeats: got 0"]),
        (["bench", "--dropout", "-1"], ["--dropout: got -1.0"]),
        (["bench", "--dtype", "float8"], ["--dtype: got 'float8'"]),
        (["bench", "--device", "tpu"], ["--device: got 'tpu'"]),
        (["report", "--json", "/no/such/folder/report.json"], ["--json: got /no/such/folder/report.json"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, parts):
    assert_one_line_error(run(*arguments), *parts)


def test_an_unknown_option_exits_with_2(run):
    code, _, err = run("bench", "--no-such-option")
    assert code == 2
    assert "--no-such-option" in err


def test_bench_runs_a_small_case(run, tmp_path):
    target = tmp_path / "bench.json"
    shape = ["--shape", "48x32", "--tokens", 16, "--rank", 4, "--dtype", "float32", "--dtype", "bfloat16"]
    code, out, _ = run("bench", *shape, "--device", "cpu", "--repeats", 2, "--json", target)
    assert code == 0
    assert "48→32 M=16 r=4 p=0.1 bfloat16" in out
    found = json.loads(target.read_text())
    assert {(row["dtype"], row["variant"]) for row in found["rows"]} >= {
        ("float32", "lora_kernels"),
        ("bfloat16", "lora_kernels, fp32 adapters"),
    }
    assert found["header"]["packages"]["torch"]
    assert found["failures"] == []


def test_bench_exits_with_1_when_a_result_is_wrong(run, monkeypatch):
    from lora_kernels.cases import linear as cases

    real = cases.lora_linear
    monkeypatch.setattr(cases, "lora_linear", lambda *args, **kwargs: 1.01 * real(*args, **kwargs))
    code, out, _ = run("bench", "--shape", "48x32", "--tokens", 16, "--rank", 4, "--device", "cpu", "--repeats", 1)
    assert code == 1
    assert "no times reported" in out


@pytest.mark.parametrize("command", ["demo", "bench", "report", "memory"])
def test_help_names_the_json_option(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out
