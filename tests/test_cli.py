"""The command line as a user meets it: exit codes, one-line errors, and JSON that has stdout to itself."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import __version__, cli
from lora_kernels.commands import environment
from lora_kernels.commands.bench import layers, peers


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
    assert {row["backend"] for row in found["backends"]} == {"cuda", "triton", "cpu", "torch"}
    assert all(row["reason"] for row in found["backends"])
    used = [row for row in found["backends"] if row["device"] == "cpu" and row["used"]]
    assert [row["backend"] for row in used] == ["cpu", "cpu"]  # float32 and bfloat16
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
        (["memory", "--size", "8b", "--rank", "0"], ["--rank: got 0, expected at least 1"]),
        (["memory", "--shape", "4by4"], ["--shape: got '4by4'", "expected KxN"]),
        (["memory", "--shape", "64x32", "--rank", "999999999999"], ["--rank: got 999999999999, expected at most"]),
        (["memory", "--shape", "64x32", "--adapter-dtype", "int8"], ["--adapter-dtype: got 'int8'", "bfloat16"]),
        (["memory", "--shape", "99999999999x4"], ["--shape: got '99999999999x4'", "numbers up to"]),
        (["memory", "--shape", "64x32", "--dropout", "2"], ["--dropout: got 2.0"]),
        (["memory", "--shape", "64x32", "--tokens", "0"], ["--tokens: got 0"]),
        (["memory", "--shape", "64x32", "--dtype", "int8"], ["--dtype: got 'int8'", "bfloat16"]),
        (["memory", "--model", "/no/such/model"], ["--model: got /no/such/model", "does not exist"]),
        (["bench", "--suite", "huge"], ["--suite: got 'huge'", "small, smollm, llama"]),
        (["bench", "--compare", "pefd"], ["--compare: got 'pefd'", "unsloth-style"]),
        (["bench", "--repeats", "0"], ["--repeats: got 0"]),
        (["bench", "--dropout", "-1"], ["--dropout: got -1.0"]),
        (["bench", "--dtype", "float8"], ["--dtype: got 'float8'"]),
        (["bench", "--dropout", "1.5"], ["--dropout: got 1.5"]),
        (["bench", "--tokens", "-1"], ["--tokens: got -1, expected at least 1"]),
        (["bench", "--rank", "0"], ["--rank: got 0, expected at least 1"]),
        (["bench", "--shape", "64x64:3"], ["--shape: got '64x64:3', expected KxN, positive"]),
        (["bench", "--quantize", "nf3", "--shape", "64x64"], ["--quantize: got 'nf3', expected nf4"]),
        (["bench", "--model", "/no/such/model"], ["--model: got /no/such/model", "does not exist"]),
        (["bench", "--device", "tpu"], ["--device: got 'tpu'"]),
        (["bench", "--device", "cpu:x"], ["--device: got 'cpu:x'"]),
        (["bench", "--device", "cuda:99"], ["--device: got 'cuda:99'"]),
        (["report", "--kernels", "--tokens", "-1"], ["--tokens: got -1, expected at least 1"]),
        (["report", "--kernels", "--shape", "64x64:3"], ["--shape: got '64x64:3', expected KxN, positive"]),
        (["report", "--kernels", "--target", "sm_70"], ["--target: got 'sm_70', expected one of sm_100, sm_120, sm_80"]),
        (["report", "--kernels", "--dtypes", "int8"], ["--dtypes: got 'int8', expected for sm_90 one of", "bf16 bf16"]),
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


def test_a_named_peer_without_a_row_is_a_failure_after_the_rows(run, monkeypatch, tmp_path):
    """One of the default, or of "all", may be missing; in either case JSON has what was measured."""
    monkeypatch.setattr(peers, "_missing", lambda package: f"not installed; run `pip install {package}`")
    target = tmp_path / "bench.json"
    case = ["bench", "--shape", "48x32", "--tokens", 16, "--rank", 4, "--repeats", 1, "--device", "cpu", "--json", target]
    for compare, expected in (((), 0), (("all",), 0), (("none",), 0), (("unsloth-style,peft",), 1), (("unsloth-style",), 1)):
        code, out, err = run(*case, *(("--compare", *compare) if compare else ()))
        assert code == expected, compare
        assert "lora_kernels" in out
        assert {row["variant"] for row in json.loads(target.read_text())["rows"]} == {"bare frozen linear", "lora_kernels"}
    assert err.endswith("lora-kernels: --compare: unsloth-style was not measured: "
                        "its fused path has no dropout: it leaves this case to PEFT\n")  # fmt: skip
    code, _, err = run(*case, "--compare", "bnb", "--quantize", "nf4")
    assert code == 1
    assert err.endswith("lora-kernels: --compare: bnb was not measured: not installed; run `pip install peft`\n")


def test_bench_measures_4_bits_and_ranks_above_the_layer(run, tmp_path):
    target = tmp_path / "bench.json"
    case = ["--shape", "64x64", "--rank", 100, "--tokens", 8, "--repeats", 1, "--device", "cpu", "--compare", "none"]
    assert run("bench", *case, "--quantize", "nf4", "--json", target)[0] == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["variant"], row["R"]) for row in rows] == [("bare frozen linear", 100), ("lora_kernels, NF4", 100)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory: MemoryError; use fewer tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory: [enforce"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0"), 1, "out of memory: CUDA out of"),
        (PermissionError(13, "Permission denied", "/root/x"), 1, "/root/x: Permission denied"),
        (OSError(28, "No space left on device"), 1, "cannot write the output: No space left on device"),
    ],
)
def test_what_is_no_fault_of_the_package_is_one_line(run, monkeypatch, error, code, line):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(layers, "run", fail)
    found = run("bench")
    assert found[:2] == (code, "")
    assert found[2].startswith(f"lora-kernels: {line}")
    assert found[2].count("\n") == 1


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(layers, "run", lambda *arguments: {}["nothing"])
    with pytest.raises(KeyError):
        run("bench")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["report", "--json", "/dev/full"], "--json: cannot write /dev/full: No space left on device"),
        (["report", ">/dev/full"], "cannot write the output: No space left on device"),
        (["report", "--json", "-", ">/dev/full"], "cannot write the output: No space left on device"),
        (["--version", ">/dev/full"], "cannot write the output: No space left on device"),
        (["bench", "--help", ">/dev/full"], "cannot write the output: No space left on device"),
    ],
)
def test_a_full_disk_is_one_line(arguments, line):
    """In a process of its own: what Python says at its end counts too."""
    command = ["bash", "-c", f"{sys.executable} -m lora_kernels {' '.join(arguments)}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"lora-kernels: {line}"
    assert "Traceback" not in result.stderr


CLOSED = [("8b", 0, ""), ("9b", 2, "--size: got '9b', expected"), ("8b --json -", 2, "--json: got -, but stdout is closed")]


@pytest.mark.parametrize(("arguments", "code", "said"), CLOSED)
def test_a_closed_stdout_is_no_bug(arguments, code, said):
    command = ["bash", "-c", f"{sys.executable} -m lora_kernels memory --size {arguments} >&-"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (code, bool(said))
    assert result.stderr.startswith(f"lora-kernels: {said}" if said else "")


def test_json_is_replaced_whole_or_not_at_all(run, monkeypatch, tmp_path):
    target, link = tmp_path / "report.json", tmp_path / "link.json"
    target.write_text("{}")
    (tmp_path / "report.json.new").write_text("a user's")
    link.symlink_to(target)
    assert run("report", "--json", link)[0] == 0
    assert link.is_symlink()
    before = target.read_text()
    assert json.loads(before)["backends"]

    def full(path, *args, **kwargs):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run("report", "--json", target)
    cure = "nothing there was changed: make room there, or save elsewhere"
    assert (code, err) == (1, f"lora-kernels: --json: cannot write {target}: No space left on device; {cure}\n")
    assert target.read_text() == before
    assert {file.name for file in tmp_path.iterdir()} == {"report.json", "link.json", "report.json.new"}
    assert (tmp_path / "report.json.new").read_bytes() == b"a user's"


def test_a_missing_package_names_the_extra_and_the_program_once(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text("{}")
    missing = "lora-kernels: the package 'transformers' is not installed; run `pip install lora_kernels[demo]`\n"
    assert run("memory", "--model", tmp_path) == (2, "", missing)


@pytest.mark.parametrize("stdout", ["", "fatal: not a git repository"])
def test_without_git_the_commit_is_unknown(run, monkeypatch, stdout):
    def no_git(command, **options):
        if not stdout:
            raise FileNotFoundError("git")
        return subprocess.CompletedProcess(command, 128, stdout="", stderr=stdout)

    monkeypatch.setattr(environment.subprocess, "run", no_git)
    assert environment.commit() is None
    code, out, _ = run(
        "bench", "--shape", "8x8", "--tokens", 8, "--rank", 2, "--repeats", 1, "--device", "cpu", "--compare", "none"
    )
    assert code == 0
    assert "commit unknown" in " ".join(out.split())
    assert "None" not in out
    assert "commit unknown" in run("report")[1]
