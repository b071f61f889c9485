"""What the commands share: one-line errors, readable numbers, and where tables and JSON go."""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STDOUT = "-"
TEXT_COLUMNS = ("reason", "value")
PLAIN_WIDTH = 160  # columns of a table that is piped: a terminal's 80 would cut the numbers


class CommandError(Exception):
    """Bad input to a command: its message is one line (what, got, expected, cure); the process exits with code 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def first_line(error: Exception) -> str:
    """Of its message; "" where there is none."""
    return str(error).strip().partition("\n")[0]


def require(command: str, *packages: str) -> list[ModuleType]:
    """Import `packages`. Raises CommandError that names the first missing one and the extra that installs it."""
    modules = []
    for package in packages:
        try:
            modules.append(importlib.import_module(package))
        except ModuleNotFoundError as error:
            raise CommandError(
                f"{command}: the package {error.name!r} is not installed; run `pip install lora_kernels[demo]`"
            ) from error
    return modules


class Output:
    """Tables on stdout, JSON in `json_target`; with the target "-" JSON has stdout to itself, tables go to stderr.

    Raises CommandError at once for a target that cannot be written, before any slow work.
    """

    def __init__(self, json_target: str | None = None):
        self.json_target = json_target
        self.console = Console(stderr=json_target == STDOUT, highlight=False)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH
        if json_target not in (None, STDOUT):
            path = Path(json_target)
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise CommandError(f"--json: got {json_target}, expected a file in an existing directory, or -")

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args, **kwargs)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], caption: str | None = None) -> None:
        """Print a table; the first column and a column "reason" are text, the others numbers, to the right."""
        result = Table()
        for index, column in enumerate(columns):
            result.add_column(column, justify="left" if index == 0 or column in TEXT_COLUMNS else "right")
        for row in rows:
            result.add_row(*(escape(str(cell)) for cell in row))
        # Printed apart: rich would wrap them to the width of the table, which may be narrow.
        self.print(f"[bold]{escape(title)}[/]")
        self.print(result)
        if caption:
            self.print(f"[dim]{escape(caption)}[/]")

    def save_progress(self, data: Any) -> None:
        """Write `data` so far to the target if that is a file: a time limit then loses nothing that was measured."""
        if self.json_target != STDOUT:
            self.write_json(data)

    def write_json(self, data: Any) -> None:
        """Write `data` to the target, if there is one."""
        if self.json_target is None:
            return
        text = json.dumps(data, indent=2, default=str)
        if self.json_target == STDOUT:
            sys.stdout.write(text + "\n")
        else:
            Path(self.json_target).write_text(text + "\n", encoding="utf-8")


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB": binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
