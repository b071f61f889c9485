"""bench/gpu.sh and what it runs, with pretended tools: nothing is lost, stages share a deadline, what lacks is named."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import optional_packages
import pytest

from lora_kernels.cases import linear, members

ROOT = Path(__file__).parents[1]
BEGIN = """bench/begin.py*) mkdir -p build/run; echo '{"machine": "gpu", "date": "2026-01-01", "time": "", "environment":
    {"gpus": [{"name": "A GPU"}], "cpu": {}, "commit": "abc"}}' >build/run/run.json; echo build/run ;;"""
PYTHON = """#!/bin/sh
target() {{ while [ "$1" != --json ] && [ "$1" != --rows ]; do shift; done; echo "$2"; }}
case "$*" in
{stages}
bench/begin.py* | bench/collect.py*) exec {python} "$@" ;;
*) exit 1 ;;
esac
"""
ROW = """echo 'row 1'; echo '{"rows": [{"n": 1}]}' >"$(target "$@")";"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The scripts with the package, and results of their own."""
    (tmp_path / "bench").mkdir()
    for file in (ROOT / "bench").glob("*.*"):
        if file.suffix in (".py", ".sh"):
            shutil.copy(file, tmp_path / "bench")
    (tmp_path / "lora_kernels").symlink_to(ROOT / "lora_kernels")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    return tmp_path


def started(tree: Path, *arguments: str, stages: str = "", **environment: str) -> subprocess.Popen:
    """gpu.sh under way, with `stages` as the branches of a shell's case over the command line after `python`."""
    tools = tree / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (
        ("python", PYTHON.format(stages=stages, python=sys.executable)),
        ("nvidia-smi", "#!/bin/sh\necho 9.0\n"),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), **environment}
    command = ["bash", str(tree / "bench/gpu.sh"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )


def wait_for(found: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return result


def test_unknown_arguments_are_refused(tree: Path) -> None:
    for arguments, got in ((["smok"], "got 'smok', expected --quick"), (["--seconds", "0"], "--seconds: got '0', expected")):
        process = started(tree, *arguments)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 2
        assert got in output


def test_killed_in_a_stage_nothing_is_lost(tree: Path) -> None:
    """Neither rows nor log, in $OUT as in bench/results; and the stage does not live on."""
    out = tree / "out"
    out.mkdir()
    process = started(
        tree, "nvidia-smi", "smoke", stages=f"bench/smoke.py*) {ROW} echo $$ >pid; sleep 100 & wait ;;", OUT=str(out)
    )
    wait_for((tree / "pid").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = out.glob("*.run-*")
    (link,) = (tree / "build/no-gpu").glob("*.run-*")
    assert link.resolve() == folder
    assert json.loads((folder / "smoke.json").read_text()) == {"rows": [{"n": 1}]}
    assert (folder / "smoke.log").read_text() == "row 1\n"
    before = json.loads(next(out.glob("*.json")).read_text())
    assert [(stage["stage"], stage["state"]) for stage in before["stages"]] == [("nvidia-smi", "passed")]
    subprocess.run([sys.executable, "bench/collect.py", str(folder)], cwd=tree, check=True)
    for file in (next(out.glob("*.json")), next((tree / "build/no-gpu").glob("*.json"))):
        after = json.loads(file.read_text())
        assert after["smoke"] == {"rows": [{"n": 1}]}
        states = [(stage["stage"], stage["state"], stage["log_tail"]) for stage in after["stages"]]
        assert states == [("nvidia-smi", "passed", "9.0\n"), ("smoke", "cut off", "row 1\n")]
        assert after["environment"]["packages"]["torch"]
    if shutil.which("setpriv"):
        stage = Path("/proc") / (tree / "pid").read_text().strip()
        wait_for(lambda: not stage.exists(), 15)


def test_stages_fail_alone_and_share_the_deadline(tree: Path) -> None:
    stages = f"""{BEGIN}
    bench/smoke.py*) {ROW} exit 3 ;;
    *bench/suite.py*) echo '{{"shard": 0, "test": "a", "outcome": "begun"}}' >"$(target "$@")" ;;
    bench/addmm_beta.py*) echo "it lacks something"; exit 77 ;;
    bench/kernel_passes.py*) {ROW} sleep 100 ;;"""
    process = started(tree, "--seconds", "15", "csrc", "smoke", "tests", "addmm_beta", "kernels", "nf4", stages=stages)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    found = json.loads((tree / "bench/results/a-gpu/2026-01-01-abc.json").read_text())
    states = {stage["stage"]: stage["state"] for stage in found["stages"]}
    assert states == {
        "csrc": "left out", "smoke": "failed", "tests": "passed", "addmm_beta": "left out", "kernels": "time limit",
        "nf4": "not started",
    }, output  # fmt: skip
    assert found["kernels"] == found["smoke"] == {"rows": [{"n": 1}]}
    assert found["tests"]["not_ended"] == ["a"]
    by = {stage["stage"]: stage for stage in found["stages"]}
    assert by["addmm_beta"]["reason"] == "it lacks something"
    assert by["nf4"]["reason"] == "the 15 s are over"
    assert by["kernels"]["seconds"] <= 6
    assert "not started" in output.splitlines()[-2]


def test_each_operation_s_tests_are_in_a_quick_run_too() -> None:
    script = (ROOT / "bench/gpu.sh").read_text()
    first = script.partition("\ntests=(")[2].partition(")")[0].split()
    assert not [file for file in first if not (ROOT / file).exists()]
    names = {f"tests/test_{prefix}{operation}.py" for operation in ("linear", "glu_mlp") for prefix in ("", "triton_")}
    assert {*names, "tests/test_linear_group.py", "tests/test_triton_group.py"} <= set(first)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """bench(name) imports bench/<name>.py as its own scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (ROOT / "bench" / f"{name}.py").exists():
            del sys.modules[name]


def test_stages_that_did_not_run_replace_none(bench: Callable[[str], ModuleType]) -> None:
    earlier = {"stages": [{"stage": "a", "state": "passed"}, {"stage": "b", "state": "failed"}], "a": 1}
    data = {"stages": [{"stage": name, "state": "not started"} for name in "abc"]}
    found = bench("collect").merged(earlier, data)
    assert [(stage["stage"], stage["state"]) for stage in found["stages"]] == [
        ("a", "passed"), ("b", "failed"), ("c", "not started"),
    ]  # fmt: skip
    assert found["a"] == 1


def test_what_a_gpu_runs_needs_torch_triton_numpy_and_pytest_alone() -> None:
    names = ("smoke", "layers", "kernel_passes", "addmm_beta", "nf4_gpu", "ncu", "begin", "suite", "suite_shard")
    without = (*optional_packages.OPTIONAL, "hypothesis")
    code = f"import sys; sys.modules.update(dict.fromkeys({without!r})); import {', '.join(names)}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_files_that_need_what_is_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_packages, "missing", lambda: frozenset({"peft", "typer"}))
    found = optional_packages.left_out()
    assert "test_peft_numerics.py" in found["peft"]
    assert "test_models_peft.py" in found["peft"]  # through another file
    assert "test_cli.py" in found["typer"]  # through the package
    assert not {"test_linear.py", "test_linear_modes.py", "test_triton_linear.py"} & {
        f for files in found.values() for f in files
    }


def test_the_suite_in_processes_goes_on_behind_one_that_dies(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(8))\n"
        "def test_a(i):\n"
        "    if i == 2: os.kill(os.getpid(), 9)\n"
        "    if i == 5: raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
        "    if i == 6: pytest.skip('a reason')\n"
        "def test_b(): assert 1 == 2\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_package\n")
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "bench/suite.py"), "--workers", "2", "--rows", str(rows), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert result.returncode == 1
    assert "5 passed" in result.stdout
    suite = bench("suite")
    with rows.open("a") as file:
        file.write('{"shard": 0, "test": "cut')  # as a kill leaves it
    found = suite.summary(suite.read(rows))
    assert found["counts"] == {"passed": 5, "failed": 3, "crashed": 1, "skipped": 1}
    reasons = {row["test"].rpartition("::")[2].rpartition("/")[2]: row["reason"] for row in found["failures"]}
    assert reasons == {
        "test_a[2]": "its process ended with -9",
        "test_a[5]": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "test_b": "assert 1 == 2",
        "test_broken.py": "it cannot be imported",
    }
    assert found["skipped"] == {"a reason": 1}
    assert not found["not_ended"]
    assert "FAILED test_some.py::test_b\n" in result.stderr  # at once, with its traceback


def test_the_smoke_test_fails_for_wrong_results_and_rejected_tiles(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    smoke = bench("smoke")
    device, file = smoke.torch.device("cpu"), tmp_path / "rows.json"
    if smoke.torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off")
    monkeypatch.setattr(smoke, "SHAPES", {"cpu": ((4, 64, 48, 8),)})
    monkeypatch.setattr(sys, "argv", ["smoke.py", "--device", "cpu", "--json", str(file)])
    assert smoke.main() == 0
    assert "no tile was rejected" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows[4:]] == 2 * [
        "q 32→32 k 32→16 v 32→16 M=17 p=0.1 float16", "gate 32→72 up 32→72 down 72→32 M=17 p=0.1 float16"
    ]  # fmt: skip
    assert [row["weight"] for row in rows] == 2 * ["dense"] + 2 * ["nf4"] + 2 * ["dense"] + 2 * ["nf4"]
    for judge, cases, gradient in ((linear, smoke.cases, "dA"), (members, smoke.blocks, "dk.lora_A")):
        problem = next(cases(device)).draw()
        exact = judge.truth(problem)
        assert not smoke.check(problem, exact, "triton")["wrong"]
        with monkeypatch.context() as patch:
            right, wrong = judge.ours, {gradient: 1.02 * exact[gradient]}
            patch.setattr(judge, "ours", lambda problem, right=right, wrong=wrong: right(problem) | wrong)
            assert smoke.check(problem, exact, "triton")["wrong"]
    compilation = smoke.load("triton", "linear").gpu.compilation
    monkeypatch.setattr(compilation, "rejected", {"project, a tile": "OutOfResources"})
    assert smoke.main() == 1
    assert "rejected: project, a tile: OutOfResources" in capsys.readouterr().out


def test_counters_are_read_and_forbidden_ones_left_out(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ncu, tool, file = bench("ncu"), tmp_path / "ncu", tmp_path / "rows.json"
    monkeypatch.setattr(ncu.shutil, "which", lambda *names, **where: str(tool))
    monkeypatch.setattr(sys, "argv", ["ncu.py", "--json", str(file)])
    lines = '"ID","Kernel Name","Metric Name","Metric Value"\n"0","k","gpu__time_duration.sum","25,120"\n'
    tool.write_text(f"#!/bin/sh\ncat <<'E'\n==PROF== Connected\n{lines}E\n")
    tool.chmod(0o755)
    assert ncu.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["kernel"] for row in rows] == list(ncu.KERNELS)
    assert rows[0]["metrics"] == {"gpu__time_duration.sum": 25120.0}
    tool.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM' >&2; exit 1\n")
    assert ncu.main() == ncu.LEFT_OUT


def test_layers_without_the_command_line(
    bench: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    layers, file = bench("layers"), tmp_path / "rows.json"
    options = "--device cpu --shape 64x48 --tokens 16 --dropout 0.1 --compare none --repeats 1 --json"
    monkeypatch.setattr(sys, "argv", ["layers.py", *options.split(), str(file)])
    assert layers.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["variant"], row["M"], row["K"], row["N"]) for row in rows] == [
        ("bare frozen linear", 16, 64, 48), ("lora_kernels", 16, 64, 48),
    ]  # fmt: skip
    assert "lora_kernels" in capsys.readouterr().out
