"""Gather the folder of one run of bench/gpu.sh or bench/cpu.sh into bench/results/<device>/<date>-<commit>.json.

    python bench/collect.py FOLDER [--table]

FOLDER is what bench/begin.py made, there or copied from another machine: run.json, stages.tsv, and a log, a JSON file and
perhaps tests.jsonl of the stages so far, of which the last may have been cut off. The same file goes beside a folder that lies
elsewhere, as in $OUT. It needs Python alone and a tenth of a second, so it runs after each stage. --table prints what each
stage came to.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import suite

ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL = 4000  # characters of each stage's log that are kept: the summary of a test run, or a traceback
LEFT_OUT, TIME_LIMIT = 77, (124, 137)  # exit codes
IDLE = ("left out", "not started")  # states of stages that measured nothing


def collect(folder: Path) -> dict[str, Any]:
    """The run, its stages with the end of their logs, and the content of each JSON file by its stage."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    run = results.pop("run")
    if (rows := folder / "tests.jsonl").exists():
        results["tests"] = suite.summary(suite.read(rows))
    return {"environment": run["environment"], "date": run["date"], "time": run["time"], "stages": stages(folder), **results}


def stages(folder: Path) -> list[dict[str, Any]]:
    """Each stage of stages.tsv by its last line: one that has only begun was cut off."""
    found: dict[str, dict[str, Any]] = {}
    lines = (folder / "stages.tsv").read_text().splitlines() if (folder / "stages.tsv").exists() else []
    for name, code, seconds, reason in (line.split("\t") for line in lines if line.count("\t") == 3):
        log = folder / f"{name}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        about = {"exit_code": int(code) if code.isdigit() else None, "seconds": float(seconds)}
        state = state_of(code)
        if state == "left out" and not reason:  # its last line says why
            reason = text.strip().rpartition("\n")[2]
        found[name] = {"stage": name, "state": state, **about, "reason": reason, "log_tail": text[-LOG_TAIL:]}
    return list(found.values())


def state_of(code: str) -> str:
    """What a stage came to, by its exit code or by what stages.sh wrote in the place of one."""
    if not code.isdigit():
        return "cut off" if code == "started" else code
    number = int(code)
    return {0: "passed", LEFT_OUT: "left out"}.get(number, "time limit" if number in TIME_LIMIT else "failed")


def merged(earlier: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """An earlier run of the same day and commit with the stages of this one in place of its own, unless they did not run."""
    old = {stage["stage"]: stage for stage in earlier["stages"]}
    new = {stage["stage"]: stage for stage in data["stages"] if not (stage["stage"] in old and stage.get("state") in IDLE)}
    kept = {key: value for key, value in earlier.items() if key not in new}
    return {**kept, **data, "stages": list({**old, **new}.values())}


def target(run: dict[str, Any]) -> Path:
    """bench/results/<device>/<date>-<commit>.json with a device name that every file system takes; build/no-gpu for a GPU's run
    without one.
    """
    found = run["environment"]
    gpus, cpu = found["gpus"], found["cpu"]
    name = f"{run['date']}-{found['commit'] or 'unknown'}.json"
    if run["machine"] == "gpu" and not gpus:
        return ROOT / "build" / "no-gpu" / name
    device = gpus[0]["name"] if run["machine"] == "gpu" else f"{cpu['name']} {cpu['threads']} cores"
    return ROOT / "bench" / "results" / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") / name


def write(path: Path, data: dict[str, Any]) -> None:
    """The whole file or, if this is killed, the old one; an earlier run's stages stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        data = merged(json.loads(path.read_text()), data)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    """Write the file, there and beside a folder that lies elsewhere; say where, or print the table."""
    folder = Path(sys.argv[1])
    data, path = collect(folder), target(json.loads((folder / "run.json").read_text()))
    beside = folder.resolve().with_name(path.name)
    for place in {path, beside}:
        write(place, data)
    if "--table" in sys.argv:
        for stage in data["stages"]:
            sys.stdout.write(f"{stage['stage']:12} {stage['state']:12} {stage['seconds']:6.0f} s  {stage['reason']}\n")
    sys.stdout.write(f"{path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
