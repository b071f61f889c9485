"""What a result file holds: runs of rows, grouped into cases, and the ratios of a case."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kernels.commands.bench.peers import BARE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Rows = list[dict[str, Any]]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> content, by name."""
    return {path.name: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def devices() -> list[Path]:
    """The folder of each device."""
    return sorted(path for path in RESULTS.iterdir() if path.is_dir())


def newest_first(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """load() by the time of the run, which files before 2026-11-22 do not have."""
    files = load(folder)
    return sorted(
        files.items(), key=lambda item: (item[1].get("time") or item[1].get("header", {}).get("time") or "", item[0])
    )[::-1]


def runs(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(stage, run) of a file: one run, or those that bench/collect.py gathered; a run has "rows"."""
    if "rows" in data:
        yield "bench", data
    for name, run in data.items():
        if isinstance(run, dict) and run.get("rows"):
            yield name, run


def kind(run: dict[str, Any]) -> str:
    """Which table a run's rows make."""
    first = run["rows"][0]
    marks = {
        "checkpointing": "memory",
        "median_s": "model",
        "beta0": "beta",
        "section": "nf4",
        "over": "kernels",
        "distance_of_seeds": "curves",
        "layers": "ranks",
        "members": "populations",
        "experts": "experts",
        "adapters": "adapters",
        "channels_last": "unet",
        "fitness": "fitness",
        "variants": "parts",
        "variant": "layer",
    }
    return next((name for mark, name in marks.items() if mark in first), "other")


def cases(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """The rows of a layer or model run, those of one case together, with its name."""
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(case_name(row), []).append(row)
    yield from groups.items()


def case_name(row: dict[str, Any]) -> str:
    """Shape, tokens, rank, dropout and dtype."""
    dora = " DoRA" if row.get("dora") else ""
    if "model" in row:
        return f"{row['model']}, {row['tokens']} tokens, r={row['R']}, p={row['p']:g}, {row['dtype']}{dora}"
    block = row.get("block", "linear")
    sizes = f"{row['K']}→{row['N']}" if block == "linear" else f"{block} {row['K']}/{row['kv']}/{row['N']}"
    forward = " forward" if row["op"] == "forward" else ""
    return f"{sizes} M={row['M']} r={row['R']} p={row['p']:g} {row['dtype']}{forward}{dora}"


def ratios(row: dict[str, Any], case: Rows, names: list[str]) -> list[str]:
    """x bare, then how many times faster than each of `names`, from the medians of the same case."""
    key = "median_s" if "median_s" in row else "median_us"
    medians = {other["variant"]: other[key] for other in case}
    faster = [f"{medians[name] / row[key]:.2f}" if name in medians else "" for name in names]
    over = row[key] / medians[BARE]
    return [f"{over:.2f}" if over > 0.1 else f"{over:.2g}", *faster]


def refusals(run: dict[str, Any]) -> Rows:
    """Peers that were asked for and not measured; files before the list was one hold peer -> reason."""
    found = run.get("peers_not_measured") or []
    if isinstance(found, dict):
        return [{"peer": peer, "case": "all", "reason": reason} for peer, reason in found.items()]
    return found


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column text."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
