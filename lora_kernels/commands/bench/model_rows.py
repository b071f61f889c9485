"""One row of the benchmark of a model: its times as data, and all of it as a line of the table."""

from typing import Any

from ..console import Output, format_bytes
from ..timing import Timing
from .peers import BARE, HEADINGS
from .rows import launches

LESS_IMPORTANT = ("launches", "held", "p20–p80", "tokens/s", "of bare's", "peak", "saved")


def times(name: str, timings: dict[str, Timing], tokens: int, peer: str | None) -> dict[str, Any]:
    """What JSON holds of the time of one variant, and the rates that follow; `peer` where it was measured too."""
    timing = timings[name]
    return {
        "variant": name,
        "median_s": timing.median,
        "p20_s": timing.p20,
        "p80_s": timing.p80,
        "tokens_per_s": tokens / timing.median,
        "times_bare": timing.median / timings[BARE].median,
        "faster_than": {peer: timings[peer].median / timing.median} if peer else {},
    }


def saved_over(row: dict[str, Any], rows: list[dict[str, Any]], names: list[str]) -> dict[str, float]:
    """What the row saves over what each of `names` does."""
    saved = {other["variant"]: other["saved_bytes"] for other in rows}
    return {name: row["saved_bytes"] / saved[name] for name in names}


def as_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(columns, cells) of a case's rows."""
    cells = [
        (
            row["variant"],
            f"{row['median_s'] * 1e3:,.1f}",
            f"{row['p20_s'] * 1e3:,.1f}–{row['p80_s'] * 1e3:,.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['times_bare']:.3f}",
            *(f"{faster:.3f}" for faster in row["faster_than"].values()),
            format_bytes(row["saved_bytes"]),
            *(f"{over:.3f}" for over in row["saved_over"].values()),
            *(format_bytes(row[name]) for name in ("held_bytes", "peak_bytes")),
            *map(str, launches(row)),
        )
        for row in rows
    ]
    others = [HEADINGS[name] for name in rows[0]["faster_than"]]
    over = [f"of {name.removeprefix('x ')}'s" for name in ("x bare", *others)]
    columns = ["variant", "median ms", "p20–p80", "tokens/s", "x bare", *others, "saved", *over, "held", "peak"]
    columns += ["launches"] if launches(rows[0]) else []
    return columns, cells


def print_rows(case: str, rows: list[dict[str, Any]], output: Output) -> None:
    """The case's table."""
    output.table(case, *as_table(rows), less_important=LESS_IMPORTANT)
