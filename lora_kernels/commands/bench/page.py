"""The benchmark's page: times and memory of each case as bars and a table, what was not measured, and where it ran."""

from itertools import groupby
from typing import Any

from ..console import format_bytes, format_seconds
from ..environment import environment_rows
from ..html import Bar, Html, bars, page, paragraph, section, table
from . import layers, model, model_rows, rows
from .peers import OURS


def bench_page(result: dict[str, Any]) -> str:
    """What the command's JSON holds, as HTML."""
    header, measured = result["header"], result["rows"]
    whole_model = any("median_s" in row for row in measured)
    ran = [*environment_rows(header), *((name, header[name]) for name in ("device", "time", "repeats", "seed"))]
    failed = [(failure["case"], failure["reason"]) for failure in result["failures"]]
    refused = [(f"{refusal['peer']}, {refusal['case']}", refusal["reason"]) for refusal in result["peers_not_measured"]]
    return page(
        f"LoRA {'training steps' if whole_model else 'layers'} on {header['device']}",
        *([section("No times reported: the correctness gate failed", table(("case", "reason"), failed))] if failed else []),
        *(_case(name, list(own)) for name, own in groupby(measured, key=lambda row: row["case"])),
        *([paragraph(model.CAPTION if whole_model else layers.CAPTION, quiet=True)] if measured else []),
        *([section("Peers not measured", table(("peer, case", "reason"), refused))] if refused else []),
        section("Environment", table(("", "value"), ran)),
    )


def _case(name: str, own: list[dict[str, Any]]) -> Html:
    whole_model = "median_s" in own[0]
    columns, cells = (model_rows if whole_model else rows).as_table(own)
    seconds = [row["median_s"] if whole_model else 1e-6 * row["median_us"] for row in own]
    times = [
        _bar(row, value, f"{format_seconds(value)}, x bare {row['times_bare']:.2f}")
        for row, value in zip(own, seconds, strict=True)
    ]
    saved = [_bar(row, row["saved_bytes"], format_bytes(row["saved_bytes"])) for row in own]
    return section(
        name if whole_model else f"{own[0]['op']}, {name}",
        bars("time, the median", times),
        bars("memory saved for the backward pass", saved),
        table(columns, cells),
    )


def _bar(row: dict[str, Any], value: float, label: str) -> Bar:
    return Bar(row["variant"], value, label, ours=row["variant"].startswith(OURS))
