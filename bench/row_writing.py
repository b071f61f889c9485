"""Rows of a benchmark, shown and written as they are measured: a kill at any moment loses none."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

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


def main(
    description: str, repeats: int, rows: Callable[[int], Iterable[dict[str, Any]]], shown: Callable[[dict[str, Any]], object]
) -> None:
    """The command line [--repeats N] [--json FILE] of a benchmark whose rows are rows(N)."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    write_rows(rows(options.repeats), options.json, shown)
