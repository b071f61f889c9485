"""Tables that fit their terminal: less important columns are left out, and named; a number is never cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

TEXT_COLUMNS = ("reason", "value", "evidence", "tile", "choice", "form")
TEXT_WIDTH = 16  # a column of text may be wrapped to so many columns of the terminal


@dataclass(frozen=True)
class Column:
    """A column's cells under its name. The table's first column and those of TEXT_COLUMNS are text, the others numbers."""

    name: str
    cells: tuple[str, ...]
    text: bool

    @property
    def natural(self) -> int:
        """Nothing is wrapped."""
        return max(cell_len(line) for line in (self.name, *self.cells))

    @property
    def least(self) -> int:
        """Numbers whole, their heading by words; text by words, and long words where TEXT_WIDTH ends."""
        words = (self.name, *self.cells) if self.text else (self.name,)
        longest = max([cell_len(word) for text in words for word in text.split()] or [0])
        return min(longest, TEXT_WIDTH) if self.text else max([longest, *map(cell_len, self.cells)])


def make_table(
    names: Iterable[str], rows: Iterable[Iterable[Any]], width: int, less_important: Sequence[str] = ()
) -> tuple[Table, list[str]]:
    """(the table for a terminal of `width` columns, the names of those of `less_important` that it has no room for).

    The columns of `less_important` go in its order, until the others fit. Where they do not fit even so, the table is wider
    than the terminal.
    """
    names, cells = list(names), [[str(cell) for cell in row] for row in rows]
    columns = [
        Column(name, tuple(row[index] for row in cells), text=index == 0 or name in TEXT_COLUMNS)
        for index, name in enumerate(names)
    ]
    left_out: list[str] = []
    for name in less_important:
        if _spare(columns, width) >= 0:
            break
        if name in names:
            left_out.append(name)
            columns = [column for column in columns if column.name != name]
    widths = [column.least for column in columns]
    spare = max(0, _spare(columns, width))
    order = sorted(range(1, len(columns)), key=lambda index: columns[index].text)  # headings, then text, which has long lines
    for index in (0, *order):
        more = min(spare, columns[index].natural - widths[index])
        widths[index] += more
        spare -= more
    table = Table(width=sum(widths) + 3 * len(widths) + 1)  # rich would otherwise cut cells to the terminal's width
    for column, size in zip(columns, widths, strict=True):
        table.add_column(escape(column.name), justify="left" if column.text else "right", width=size, overflow="fold")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(escape, row))
    return table, left_out


def _spare(columns: list[Column], width: int) -> int:
    """What `width` leaves for wider columns than the narrowest, beside a line and two blanks for each and the last line."""
    return width - 1 - sum(3 + column.least for column in columns)
