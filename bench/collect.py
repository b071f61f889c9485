"""Gather one run of bench/gpu.sh or bench/cpu.sh into bench/results/<device>/<date>-<commit>.json, and a copy in $OUT.

`PYTHONPATH=. python bench/collect.py FOLDER`: FOLDER holds stages.tsv, and a log and perhaps a JSON file of each stage.
"""

import datetime
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from lora_kernels.commands.environment import environment

ROOT = Path(__file__).resolve().parent.parent
LOG_TAIL = 4000  # characters of each stage's log that are kept: the summary of a test run, or a traceback


def collect(folder: Path) -> dict[str, Any]:
    """Environment, stages with exit code, seconds and the end of their log, and each JSON file by its stage."""
    stages = []
    for line in (folder / "stages.tsv").read_text().splitlines():
        name, code, seconds = line.split("\t")
        log = (folder / f"{name}.log").read_text(errors="replace")
        stages.append({"stage": name, "exit_code": int(code), "seconds": float(seconds), "log_tail": log[-LOG_TAIL:]})
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {"environment": environment(), "stages": stages, **results}


def merged(earlier: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """An earlier run of the same day and commit with the stages of this one in place of its own."""
    names = {stage["stage"] for stage in data["stages"]}
    kept = [stage for stage in earlier["stages"] if stage["stage"] not in names]
    return {**{key: value for key, value in earlier.items() if key not in names}, **data, "stages": kept + data["stages"]}


def target(found: dict[str, Any], date: str) -> Path:
    """bench/results/<device>/<date>-<commit>.json with a device name that every file system takes."""
    gpus, cpu = found["gpus"], found["cpu"]
    device = gpus[0]["name"] if gpus else f"{cpu['name']} {cpu['threads']} cores"
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "bench" / "results" / folder / f"{date}-{found['commit'] or 'unknown'}.json"


def main() -> None:
    """Write the file, say where, copy it."""
    data = collect(Path(sys.argv[1]))
    now = datetime.datetime.now(datetime.timezone.utc)
    data["date"], data["time"] = now.date().isoformat(), now.strftime("%Y-%m-%dT%H:%M:%SZ")
    path = target(data["environment"], data["date"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        data = merged(json.loads(path.read_text()), data)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(path.relative_to(ROOT))
    if os.environ.get("OUT"):
        shutil.copy(path, os.environ["OUT"])


if __name__ == "__main__":
    main()
