"""Make the folder of one run and print its path: bench/results/<device>/<date>-<commit>.run-<time>, with what it runs on in it.

`PYTHONPATH=. python bench/begin.py gpu|cpu`. If $OUT is set, the folder lies there, and bench/results has a link to it. A run
on a GPU where torch sees none, as in a rehearsal, goes to build/no-gpu.
"""

import datetime
import json
import os
import sys
from pathlib import Path

from collect import ROOT, target

from lora_kernels.commands.environment import environment


def begin(machine: str) -> Path:
    """The folder, new."""
    found, now = environment(), datetime.datetime.now(datetime.timezone.utc)
    run = {
        "machine": machine,
        "date": now.date().isoformat(),
        "time": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "environment": found,
    }
    collected = target(run)
    folder = collected.with_name(f"{collected.stem}.run-{now.strftime('%H%M%S')}-{os.getpid()}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if out := os.environ.get("OUT"):
        real = Path(out).absolute() / folder.name
        real.mkdir(parents=True)
        folder.symlink_to(real)
    else:
        folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    if sys.argv[1:] not in (["gpu"], ["cpu"]):
        sys.exit(f"bench/begin.py: got {sys.argv[1:]}, expected gpu or cpu")
    made = begin(sys.argv[1])
    sys.stdout.write(f"{made.relative_to(ROOT)}\n")
