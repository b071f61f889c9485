"""Rows of a benchmark, shown and written as they are measured: a kill at any moment loses none."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment


def write_rows(rows: Iterable[dict[str, Any]], path: Path | None, shown: Callable[[dict[str, Any]], object]) -> None:
    """Print `shown` of each row and, where there is a path, write all rows so far with the environment."""
    found = []
    for row in rows:
        found.append(row)
        print(shown(row), flush=True)
        if path:
            write_whole(path, json.dumps({"environment": environment(), "rows": found}, indent=1), "--json")
