"""What the commands share: one-line errors, readable numbers, progress, and where tables and JSON go.

rich is imported where something is printed with it: benchmarks run where it is not installed.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..models.atomic_files import all_or_nothing

if TYPE_CHECKING:
    from rich.console import Console

STDOUT = "-"
PLAIN_WIDTH = 160  # columns of what is piped without COLUMNS: a terminal's 80 would leave numbers out
BAD_INPUT, FAILED = 2, 1  # exit codes


class CommandError(Exception):
    """What ends a command: a message of one line (what, got, expected, cure) and the exit code, BAD_INPUT by default."""

    def __init__(self, message: str, exit_code: int = BAD_INPUT):
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Of its message; "" where there is none."""
    return str(error).strip().partition("\n")[0]


def require(*packages: str) -> list[ModuleType]:
    """Import `packages`. Raises CommandError that names the first missing one and the extra that installs it."""
    modules = []
    for package in packages:
        try:
            modules.append(importlib.import_module(package))
        except ModuleNotFoundError as error:
            raise CommandError(f"the package {error.name!r} is not installed; run `pip install lora_kernels[demo]`") from error
    return modules


def write_whole(path: Path, text: str, option: str) -> None:
    """Write a file that others may read meanwhile, or that a time limit may end: the new text or the old one, no part of it.

    A pipe, a device, and a file in a folder that takes no other are written to as they are.
    Raises CommandError that names `option`.
    """
    try:
        target = path.resolve()  # a link stays one
        if _is_device(path) or not os.access(target.parent, os.W_OK):
            path.write_text(text, encoding="utf-8")
            return
        with all_or_nothing(target.parent) as folder:
            (folder / target.name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{option}: cannot write {path}: {error.strerror}", FAILED) from error


def make_writable(folder: Path, option: str) -> None:
    """Make `folder` where it is missing. Raises CommandError that names `option` unless files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{option}: cannot create {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"{option}: got {folder}, which is not writable; pass another folder")


class Output:
    """Tables on stdout, JSON in `json_target`, a page in `html_target`, progress on stderr; of JSON "-" has stdout to itself.

    Raises CommandError at once for a target that cannot be written, before any slow work.
    """

    def __init__(self, json_target: str | None = None, html_target: str | None = None):
        self.json_target, self.html_target = json_target, html_target
        self.console = _console(stderr=json_target == STDOUT)
        self.progress = _console(stderr=True)
        if json_target == STDOUT and sys.stdout is None:
            raise CommandError("--json: got -, but stdout is closed; pass a file, or leave stdout open")
        if json_target not in (None, STDOUT):
            _check_target(Path(json_target), "--json", ", or -")
        if html_target is not None:
            _check_target(Path(html_target), "--html")
            if json_target is not None and Path(json_target).resolve() == Path(html_target).resolve():
                raise CommandError(f"--html: got {html_target}, which --json writes; pass another file")

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args, **kwargs)

    @contextlib.contextmanager
    def status(self, what: str) -> Iterator[None]:
        """Say on stderr what takes long: a line that goes again, on no terminal one that stays.

        It does not move: the thread of a spinner would take the interpreter from what is timed.
        """
        if self.progress.is_terminal:
            from rich.live import Live
            from rich.text import Text

            with Live(Text(f"{what} …"), console=self.progress, auto_refresh=False, transient=True):
                yield
        else:
            self.progress.print(what, markup=False)
            yield

    def table(
        self,
        title: str,
        columns: Iterable[str],
        rows: Iterable[Iterable[Any]],
        caption: str | None = None,
        less_important: Sequence[str] = (),
    ) -> None:
        """Print a table as wide as the terminal allows; the columns of `less_important` are left out first, in that order."""
        from rich.markup import escape

        from .tables import make_table

        result, left_out = make_table(columns, rows, self.console.width, less_important)
        # Printed apart: rich would wrap them to the width of the table, which may be narrow.
        self.print(f"[bold]{escape(title)}[/]")
        self.print(result, crop=False)
        if left_out:
            hint = f"Not shown in {self.console.width} columns: {', '.join(left_out)}. --json has all."
            self.print(f"[dim]{escape(hint)}[/]")
        if caption:
            self.print(f"[dim]{escape(caption)}[/]")

    def save_progress(self, data: Any) -> None:
        """Write `data` so far to the target if that is a file: a time limit then loses nothing that was measured."""
        if self.json_target not in (None, STDOUT) and not _is_device(Path(str(self.json_target))):
            self.write_json(data)

    def write_json(self, data: Any) -> None:
        """Write `data` to the target, if there is one."""
        if self.json_target is None:
            return
        text = json.dumps(data, indent=2, default=str) + "\n"
        if self.json_target == STDOUT:
            sys.stdout.write(text)
        else:
            write_whole(Path(self.json_target), text, "--json")

    def write_html(self, text: str) -> None:
        """Write the page to its target."""
        write_whole(Path(str(self.html_target)), text, "--html")


def _check_target(path: Path, option: str, others: str = "") -> None:
    """Raise CommandError unless a file can be written there. others: what else `option` takes."""
    if path.is_dir() or str(path) == STDOUT or not path.absolute().parent.is_dir():
        raise CommandError(f"{option}: got {path}, expected a file in an existing directory{others}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise CommandError(f"{option}: got {path}, which is not writable; pass another file")


def _console(stderr: bool) -> "Console":
    """On no terminal as wide as COLUMNS says."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if console.width < 1 or (not console.is_terminal and not os.environ.get("COLUMNS", "").isdigit()):
        console.width = PLAIN_WIDTH
    return console


def _is_device(path: Path) -> bool:
    """Also a pipe: what is written there cannot be replaced by what comes later."""
    return path.exists() and not path.is_file()


def format_seconds(seconds: float) -> str:
    """0.0123 -> "12.30 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:,.2f} {unit}"
    return f"{seconds * 1e6:,.2f} µs"


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB": binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
