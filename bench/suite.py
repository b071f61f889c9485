"""The test suite over several processes with nothing but pytest: each takes every n-th test, and what fails is said at once.

    PYTHONPATH=. python bench/suite.py --workers 12 --rows FILE [pytest's arguments]

FILE gets a line of JSON as a test begins and one as it ends (by suite_shard.py), so that whatever ends this, it is known what
passed, what failed and what was running. A process that dies, or to which the GPU is lost, costs one test: another one goes on
behind it. Files of tests that import a package that is not installed are left out, and counted.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
MAX_PROCESSES = 30  # of one shard


def read(file: Path) -> Rows:
    """The rows so far; a last line that was cut off is none."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def summary(rows: Rows) -> dict[str, Any]:
    """What the rows say together: counts, failures, tests that did not end, reasons of skips, the slowest."""
    ended = [row for row in rows if row["outcome"] != "begun"]
    names = {row["test"] for row in ended}
    skips = Counter(row["reason"] for row in ended if row["outcome"] == "skipped")
    slowest = sorted(ended, key=lambda row: -row["seconds"])[:10]
    return {
        "counts": dict(Counter(row["outcome"] for row in ended)),
        "failures": [row for row in ended if row["outcome"] in ("failed", "crashed")],
        "not_ended": [row["test"] for row in rows if row["outcome"] == "begun" and row["test"] not in names],
        "skipped": dict(skips.most_common()),
        "slowest": [f"{row['seconds']:.1f} s {row['test']}" for row in slowest],
    }


# ---- the processes ----


def run_shard(shard: int, workers: int, rows: Path, arguments: list[str], unfinished: list[str]) -> None:
    """Every `workers`-th test from `shard` on, in one process or, where one dies, in several."""
    command = [sys.executable, "-m", "pytest", "-p", "suite_shard", "--rows", str(rows), "--shard", f"{shard}/{workers}"]
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parent}"}
    skip = -1
    for _ in range(MAX_PROCESSES):
        begun = sum(row["outcome"] == "begun" for row in read(rows) if row["shard"] == shard)
        if begun == skip:  # the last one died before its first test, and so would the next
            break
        skip = begun
        options = ["--skip", str(skip), *arguments]
        code = subprocess.run([*command, *options], stdout=subprocess.DEVNULL, env=environment).returncode
        if code in (0, 1, 5):  # passed, failed, nothing collected
            return
        for test in summary([row for row in read(rows) if row["shard"] == shard])["not_ended"]:
            sys.stderr.write(f"CRASHED {test}: exit code {code}\n")
            append(rows, shard=shard, test=test, outcome="crashed", seconds=0.0, reason=f"its process ended with {code}")
    unfinished.append(f"shard {shard} of {workers} did not finish")


def append(file: Path, **row: Any) -> None:
    """One write at the end of the file, which several processes share."""
    with file.open("ab", buffering=0) as stream:
        stream.write(json.dumps(row).encode() + b"\n")


def main() -> int:
    """Run the shards, print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=Path, required=True, metavar="FILE")
    options, arguments = parser.parse_known_args()
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    import optional_packages

    options.rows.touch()
    left_out = optional_packages.left_out()
    names = {name for files in left_out.values() for name in files}
    arguments = [argument for argument in arguments if Path(argument).name not in names]
    # The options of pyproject.toml are those of a plugin that may not be there; an error in one file costs that file.
    arguments = ["-o", "addopts=--strict-markers", "--continue-on-collection-errors", "-p", "no:cacheprovider", *arguments]
    unfinished: list[str] = []
    threads = [
        threading.Thread(target=run_shard, args=(shard, options.workers, options.rows, arguments, unfinished))
        for shard in range(options.workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = summary(read(options.rows))
    print_summary(found, left_out, unfinished)
    return 1 if found["failures"] or unfinished or not found["counts"].get("passed") else 0


def print_summary(found: dict[str, Any], left_out: dict[str, list[str]], unfinished: list[str]) -> None:
    """Of a whole run, in lines."""
    sys.stdout.write("\nslowest: " + ", ".join(found["slowest"]) + "\n")
    sys.stdout.write("".join(f"skipped {count}: {reason}\n" for reason, count in found["skipped"].items()))
    for package, files in left_out.items():
        sys.stdout.write(f"left out, {package} is not installed: {len(files)} files: {', '.join(files)}\n")
    sys.stdout.write("".join(f"failed: {row['test']}\n" for row in found["failures"]))
    sys.stdout.write("".join(f"{line}\n" for line in unfinished))
    sys.stdout.write(", ".join(f"{count} {outcome}" for outcome, count in found["counts"].items()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
