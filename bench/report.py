"""Tables and plots from the committed result files: bench/results/<device>/README.md and *.svg, and the CPU's
table in docs/benchmarks.md with the picture of README.

Everything is computed from the JSON files beside it, in the order of their names: run it again after adding or removing one.
bench/results/README.md and predictions.json are predictions.py's.

    PYTHONPATH=. python bench/report.py [--no-plots]
"""

import json
import sys
from pathlib import Path
from typing import Any

import predictions
from result_files import RESULTS, ROOT, Rows, case_name, cases, devices, kind, load, newest_first, ratios, refusals, runs, table
from tables import TABLES

from lora_kernels.commands.bench.peers import BARE, FUSED, OURS, OURS_FUSED, PEFT
from lora_kernels.commands.console import format_bytes

MARKS = ("<!-- measured, by bench/report.py -->\n", "<!-- end of measured -->\n")
DEVICE = "amd-epyc-2-cores"
BENCHMARKS = ROOT / "docs/benchmarks.md"
PICTURE = ROOT / "docs/measured.svg"


def page(folder: Path) -> str:
    """README.md of one device's folder."""
    lines = [f"# Measured on {folder.name}\n\nMade by `bench/report.py` from the JSON files here; medians, p20–p80. "]
    lines.append("× bare: time over the bare frozen linear's; × a peer: how many times faster than that row.\n")
    for name, data in load(folder).items():
        header = data.get("environment") or data.get("header") or {}
        versions = ", ".join(f"{key} {value}" for key, value in header.get("packages", {}).items() if value)
        gpus = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in header.get("gpus", []))
        cpu = header.get("cpu", {})
        where = gpus or f"{cpu.get('name')}, {cpu.get('threads')} threads, {cpu.get('vector_level')}"
        lines.append(f"\n## [{name}]({name})\n\n{where}; commit {header.get('commit')}; {versions}\n")
        states = [f"{stage['stage']} {stage['state']}" for stage in data.get("stages", []) if "state" in stage]
        lines.append(f"\nStages: {', '.join(states)}.\n" if states else "")
        for stage, run in runs(data):
            if kind(run) not in TABLES:
                lines.append(f"\n### {stage}\n\nRaw rows only: see the file.\n")
                continue
            lines.append(f"\n### {stage}\n\n")
            lines.append("".join(f"![{plot}]({plot})\n\n" for plot in plot_names(name, stage, run)))
            lines.append(TABLES[kind(run)](run))
            lines += [f"\nNot measured: {refusal_line(refusal)}.\n" for refusal in refusals(run)]
            lines += [f"\nFAILED {failure['case']}: {failure['reason']}\n" for failure in run.get("failures", [])]
    return "".join(lines)


def plot_names(name: str, stage: str, run: dict[str, Any]) -> list[str]:
    """The plots of a run; kinds without one have none."""
    return [f"{Path(name).stem}-{stage}.svg"] if kind(run) in ("layer", "model", "memory", "fitness") else []


def refusal_line(refusal: dict[str, Any]) -> str:
    case = "" if refusal["case"] == "all" else f" at {refusal['case']}"
    return f"{refusal['peer']}{case}: {refusal['reason']}"


def measured_block(folder: Path) -> str:
    """The CPU's table, from the newest file with float32 layers: stage "layer", every other one where PEFT is faster, fused
    blocks, and the model steps.
    """
    name, data, layers, blocks, steps = newest_float32(folder)
    rows = _measured_rows([row for stage, row in layers if stage == "layer"])
    rows += [row for row in _measured_rows([row for stage, row in layers if stage != "layer"]) if row[3].startswith("**")]
    columns = ["layer", "× bare linear", "PEFT × bare", "faster than PEFT", "saved beyond x (PEFT; bare)"]
    rows += _measured_rows(blocks, OURS_FUSED) + _measured_rows(steps, OURS, OURS_FUSED)
    source = (
        f"From `bench/results/{folder.name}/{name}`; all rows, spreads and plots: `bench/results/{folder.name}/README.md`. "
    )
    return table(columns, rows) + "\n" + source + _without_bf16(data.get("avx2")) + "\n"


def newest_float32(folder: Path) -> tuple[str, dict[str, Any], list[tuple[str, dict[str, Any]]], Rows, Rows]:
    """The name and data of the newest file with float32 layers; their rows with their stages, blocks' rows, models' rows."""
    for name, data in newest_first(folder):
        found = [(stage, row) for stage, run in runs(data) if kind(run) == "layer" for row in run["rows"]]
        found = [(stage, row) for stage, row in found if not row.get("dora") and row["dtype"] == "float32"]
        layers = [(stage, row) for stage, row in found if row.get("block", "linear") == "linear"]
        if layers:
            blocks = [row for _, row in found if row.get("block", "linear") != "linear"]
            return name, data, layers, blocks, [row for stage, run in runs(data) if stage == "model" for row in run["rows"]]
    raise ValueError(f"{folder}: no result file has float32 layers, expected one; run bench/cpu.sh")


def picture_cases(folder: Path) -> tuple[str, list[dict[str, dict[str, Any]]]]:
    """README's picture: the file, and by variant the rows of the largest layer, the blocks and the models, all with dropout."""
    name, _, layers, blocks, steps = newest_float32(folder)
    found = [case for rows in ([row for stage, row in layers if stage == "layer"], blocks, steps) for _, case in cases(rows)]
    largest = max(row["M"] for _, row in layers)
    dropped = [case for case in found if case[0]["p"] and case[0].get("M", largest) in (largest, *(row["M"] for row in blocks))]
    return name, [{row["variant"]: row for row in case} for case in dropped]


def _without_bf16(run: dict[str, Any] | None) -> str:
    """A sentence on a CPU without bf16 instructions."""
    if run is None:
        return ""
    name, case = next(cases(run["rows"]))
    ms = {row["variant"]: f"{row['median_us'] / 1e3:,.0f} ms" for row in case}
    return (
        f"In bf16, held to AVX2 as on a CPU without bf16 instructions, {name.removesuffix(' bfloat16')} takes {ms[OURS]} "
        f"against {ms[PEFT]}: there PyTorch's own backward products run in a scalar loop, and ours through float32 in tiles."
    )


def _measured_rows(rows: Rows, *variants: str) -> list[list[str]]:
    return [row for _, case in cases(rows) for name in variants or (OURS,) if (row := _measured_row(case, name))]


def _measured_row(case: Rows, variant: str = OURS) -> list[str] | None:
    by = {row["variant"]: row for row in case}
    if not {BARE, variant, PEFT} <= by.keys():
        return None
    ours, theirs = by[variant], by[PEFT]
    over, faster = ratios(ours, case, [PEFT])
    faster = f"{faster}×" if float(faster) >= 1 else f"**{faster}×**"  # where it loses is seen first
    saved, *others = (format_bytes(row["saved_bytes"]) for row in (ours, theirs, by[BARE]))
    saved = f"{saved} ({'; '.join(others)})"
    return [case_name(ours) + (FUSED if variant == OURS_FUSED else ""), over, ratios(theirs, case, [])[0], faster, saved]


def with_block(page: str, block: str) -> str:
    """`page` with what stands between the marks replaced."""
    (before, rest), end = page.split(MARKS[0]), MARKS[1]
    return before + MARKS[0] + block + end + rest.split(end)[1]


def pages() -> dict[Path, str]:
    """Every generated text file and its content."""
    found = {folder / "README.md": page(folder) for folder in devices()}
    found[RESULTS / "predictions.json"] = json.dumps(predictions.predictions(), indent=1) + "\n"
    found[RESULTS / "README.md"] = predictions.page()
    found[BENCHMARKS] = with_block(BENCHMARKS.read_text(encoding="utf-8"), measured_block(RESULTS / DEVICE))
    return found


def main() -> int:
    """Write the pages, and the plots unless told not to."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
    if "--no-plots" not in sys.argv:
        import plots

        for folder in devices():
            for name, data in load(folder).items():
                for stage, run in runs(data):
                    for target in plot_names(name, stage, run):
                        plots.draw(kind(run), run, folder / target)
        plots.draw_picture(*picture_cases(RESULTS / DEVICE), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
