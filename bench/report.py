"""Tables and plots from the committed result files: bench/results/<device>/README.md and *.svg, and README's CPU table.

Everything is computed from the JSON files beside it, in the order of their names: run it again after adding or removing one.
bench/results/README.md and predictions.json are predictions.py's.

    PYTHONPATH=. python bench/report.py [--no-plots]
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import predictions
from result_files import RESULTS, ROOT, Rows, case_name, cases, devices, kind, load, newest_first, ratios, refusals, runs, table

from lora_kernels.commands.bench.peers import BARE, FUSED, HEADINGS, OURS, OURS_FUSED, PEFT
from lora_kernels.commands.console import format_bytes

MARKS = ("<!-- measured, by bench/report.py -->\n", "<!-- end of measured -->\n")
README_DEVICE = "amd-epyc-2-cores"
README_PLOTS = {"layer": "Time over the bare linear layer's", "memory": "Peak memory over the sequence length"}


# ---- a table of each kind ----


def layer_table(run: dict[str, Any]) -> str:
    names = [name for name in HEADINGS if any(row["variant"] == name for row in run["rows"])]
    columns = [
        "case",
        "variant",
        "µs",
        "p20–p80",
        "TFLOP/s",
        "GB/s",
        "× bare",
        *(HEADINGS[n].replace("x ", "× ") for n in names),
    ]
    with_host = any("host_us" in row for row in run["rows"])  # not in runs before it was measured
    rows = []
    for name, case in cases(run["rows"]):
        for row in case:
            times = [f"{row['median_us']:,.0f}", f"{row['p20_us']:,.0f}–{row['p80_us']:,.0f}", f"{row['tflops']:.3g}"]
            gbs = f"{row['gbs']:.3g}" if "gbs" in row else ""
            launches = "" if row.get("launches") is None else str(row["launches"])
            sizes = [format_bytes(row["saved_bytes"]), format_bytes(row["peak_bytes"]), launches]
            host = [f"{row['host_us']:,.0f}" if row.get("host_us") else ""] if with_host else []
            rows.append([name, row["variant"], *times, gbs, *ratios(row, case, names), *sizes, *host])
    return table([*columns, "saved", "peak", "launches", *(["host µs"] if with_host else [])], rows)


def model_table(run: dict[str, Any]) -> str:
    rows = []
    for name, case in cases(run["rows"]):
        saved = {row["variant"]: row["saved_bytes"] for row in case}
        for row in case:
            times = [f"{1e3 * row['median_s']:,.1f}", f"{1e3 * row['p20_s']:,.1f}–{1e3 * row['p80_s']:,.1f}"]
            over = [f"{row['saved_bytes'] / saved[other]:.3f}" if other in saved else "" for other in (BARE, PEFT)]
            held, peak = (format_bytes(row[key]) for key in ("held_bytes", "peak_bytes"))
            about = [name, row["variant"], *times, f"{row['tokens_per_s']:,.0f}", *ratios(row, case, [PEFT])]
            rows.append([*about, format_bytes(row["saved_bytes"]), *over, held, peak])
    times = ["ms", "p20–p80", "tokens/s", "× bare", "× PEFT"]
    return table(["model", "variant", *times, "saved", "of bare's", "of PEFT's", "held", "peak"], rows)


def memory_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['variant']}{', checkpointed' if row['checkpointing'] else ''}",
            str(row["tokens"]),
            "" if row["saved_bytes"] is None else format_bytes(row["saved_bytes"]),
            format_bytes(row["held_bytes"]),
            format_bytes(row["peak_bytes"]),
        ]
        for row in run["rows"]
    ]
    about = f"{run['model']}, r={run['R']}, p={run['p']:g}, {run['dtype']}; beyond the model itself.\n\n"
    return about + table(["training", "tokens", "saved", "held", "peak"], rows)


def kernels_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['variant']} {row['K']}→{row['N']} M={row['M']} r={row['R']} p={row['p']:g} {row['adapter']}",
            *(f"{1e6 * row['timing'][key]:,.1f}" for key in ("median", "p20", "p80")),
            f"{row['flops'] / row['timing']['median'] * 1e-12:.0f}" if row["flops"] else "",
            "" if row["flops"] else f"{row['bytes'] / row['timing']['median'] * 1e-9:.0f}",
            f"{row['over']:.3f}",
        ]
        for row in run["rows"]
    ]
    return table(["kernel", "µs", "p20", "p80", "TFLOP/s", "GB/s", "× copy or bare"], rows)


def nf4_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['section']} {row['variant']} {row['K']}→{row['N']} M={row['M']} p={row['p']:g}",
            *(f"{1e6 * row['timing'][key]:,.1f}" for key in ("median", "p20", "p80")),
            f"{row['bytes'] / row['timing']['median'] * 1e-9:.0f}" if row["bytes"] else "",
            f"{row['over']:.3f}",
            "" if row["peak_bytes"] is None else format_bytes(row["peak_bytes"]),
        ]
        for row in run["rows"]
    ]
    about = "over: dequantise, × the copy's bandwidth; product, byte floor / time; training, time / bare products.\n\n"
    return about + table(["NF4", "µs", "p20", "p80", "GB/s", "over", "peak"], rows)


def parts_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        case = f"{row['op']} {row['K']}→{row['N']}" + "".join(f" {name}={row[name]:g}" for name in ("M", "p") if name in row)
        for variant, t in row["variants"].items():
            times = [f"{1e3 * t['median']:,.2f}", f"{1e3 * t['p20']:,.2f}–{1e3 * t['p80']:,.2f}"]
            rows.append([f"{case} {row['dtype']}", variant, *times, f"{t['times_ours']:.2f}"])
    return table(["case", "variant", "ms", "p20–p80", "time over ours"], rows)


def beta_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['direction']} {row['K']}→{row['N']} M={row['M']} {row['dtype']}",
            *(f"{1e6 * row[key]['median']:,.1f}" for key in ("beta0", "beta1", "mm_add")),
            f"{row['ratio']:.3f}",
        ]
        for row in run["rows"]
    ]
    return table(["product", "beta=0 µs", "beta=1 µs", "mm, then add_ µs", "beta=1 / beta=0"], rows)


def curves_table(run: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['model']}, p={row['dropout']:g}",
            f"{row['peft'][0]:.3f}, {row['peft'][-1]:.3f}",
            f"{row['accelerated'][-1]:.3f}",
            f"{row['distance_of_accelerated']:.1e}",
            f"{row['distance_of_seeds']:.1e}",
            ", ".join(f"{calls} {reason}" for reason, calls in row["calls"].items()),
        ]
        for row in run["rows"]
    ]
    about = f"Mean distance from PEFT's loss curve over {run['steps']} steps, beside that of PEFT with another seed.\n\n"
    columns = ["model", "PEFT's first and last loss", "accelerated last", "accelerated", "PEFT, another seed", "calls"]
    return about + table(columns, rows)


def ranks_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        times = [f"{row['ms'][name]['median']:,.1f}" for name in ("peft", "ours")]
        rows.append([f"{row['layers']} layers of {row['features']} features", *times, f"{row['ratio']:.1f}"])
    return "A step of AdaLoRA's allocator.\n\n" + table(["layers", "PEFT ms", "ours ms", "× PEFT"], rows)


def populations_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        times = [f"{row['ms'][name]['median']:,.2f}" for name in ("one by one", "population", "frozen")]
        case = f"P={row['members']} M={row['M']} {row['K']}→{row['N']}"
        rows.append([case, *times, f"{row['ratio']:.1f}", f"{row['over']:.2f}"])
    columns = ["EGGROLL", "members one by one, ms", "population, ms", "frozen layer, ms", "× one by one", "× frozen"]
    return "A forward pass of P members with M rows each.\n\n" + table(columns, rows)


def fitness_table(run: dict[str, Any]) -> str:
    rows = []
    for row in run["rows"]:
        curve, last = row["fitness"], len(row["fitness"]) - 1
        marks = ", ".join(f"{curve[last * quarter // 4]:.2f}" for quarter in range(5))
        rows.append(
            [
                f"rank {row['rank']}, P={row['population']}, {row['dtype']}",
                marks,
                f"{row['final']:.3f}",
                f"{row['majority']:.3f}",
            ]
        )
    about = f"Accuracy of a network of sign activations over {last + 1} steps of EGGROLL by that accuracy.\n\n"
    return about + table(["training", "mean of the population, by quarters", "the model's at the end", "of one answer"], rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "layer": layer_table,
    "model": model_table,
    "memory": memory_table,
    "kernels": kernels_table,
    "nf4": nf4_table,
    "parts": parts_table,
    "beta": beta_table,
    "curves": curves_table,
    "ranks": ranks_table,
    "populations": populations_table,
    "fitness": fitness_table,
}


# ---- the pages ----


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
    return [f"{Path(name).stem}-{stage}.svg"] if kind(run) in ("layer", "model", "memory") else []


def refusal_line(refusal: dict[str, Any]) -> str:
    case = "" if refusal["case"] == "all" else f" at {refusal['case']}"
    return f"{refusal['peer']}{case}: {refusal['reason']}"


def readme_block(folder: Path) -> str:
    """README's table of the CPU, from the newest file with float32 layers: stage "layer", every other one where PEFT is faster,
    fused blocks, and the model steps.
    """
    for name, data in newest_first(folder):
        layers = [(stage, row) for stage, run in runs(data) if kind(run) == "layer" for row in run["rows"]]
        layers = [(stage, row) for stage, row in layers if not row.get("dora")]
        layers = [(stage, row) for stage, row in layers if row["dtype"] == "float32"]
        blocks = [row for _, row in layers if row.get("block", "linear") != "linear"]
        layers = [(stage, row) for stage, row in layers if row.get("block", "linear") == "linear"]
        if not layers:
            continue
        rows = _readme_rows([row for stage, row in layers if stage == "layer"])
        rows += [row for row in _readme_rows([row for stage, row in layers if stage != "layer"]) if row[3].startswith("**")]
        columns = ["layer", "× bare linear", "PEFT × bare", "faster than PEFT", "saved beyond x (PEFT; bare)"]
        steps = [row for stage, run in runs(data) if stage == "model" for row in run["rows"]]
        rows += _readme_rows(blocks, OURS_FUSED) + _readme_rows(steps, OURS, OURS_FUSED)
        source = f"From [{name}](bench/results/{folder.name}/{name}); all rows, spreads and plots: "
        source += f"[bench/results/{folder.name}](bench/results/{folder.name}/README.md). "
        plots = [(stage, plot) for stage, run in runs(data) if stage in README_PLOTS for plot in plot_names(name, stage, run)]
        images = "".join(f"\n![{README_PLOTS[stage]}](bench/results/{folder.name}/{plot})\n" for stage, plot in plots)
        return table(columns, rows) + "\n" + source + _without_bf16(data.get("avx2")) + "\n" + images
    return ""


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


def _readme_rows(rows: Rows, *variants: str) -> list[list[str]]:
    return [row for _, case in cases(rows) for name in variants or (OURS,) if (row := _readme_row(case, name))]


def _readme_row(case: Rows, variant: str = OURS) -> list[str] | None:
    by = {row["variant"]: row for row in case}
    if not {BARE, variant, PEFT} <= by.keys():
        return None
    ours, theirs = by[variant], by[PEFT]
    over, faster = ratios(ours, case, [PEFT])
    faster = f"{faster}×" if float(faster) >= 1 else f"**{faster}×**"  # where it loses is seen first
    saved, *others = (format_bytes(row["saved_bytes"]) for row in (ours, theirs, by[BARE]))
    saved = f"{saved} ({'; '.join(others)})"
    return [case_name(ours) + (FUSED if variant == OURS_FUSED else ""), over, ratios(theirs, case, [])[0], faster, saved]


def with_block(readme: str, block: str) -> str:
    """`readme` with what stands between the marks replaced."""
    (before, rest), end = readme.split(MARKS[0]), MARKS[1]
    return before + MARKS[0] + block + end + rest.split(end)[1]


def pages() -> dict[Path, str]:
    """Every generated text file and its content."""
    found = {folder / "README.md": page(folder) for folder in devices()}
    found[RESULTS / "predictions.json"] = json.dumps(predictions.predictions(), indent=1) + "\n"
    found[RESULTS / "README.md"] = predictions.page()
    readme = ROOT / "README.md"
    found[readme] = with_block(readme.read_text(encoding="utf-8"), readme_block(RESULTS / README_DEVICE))
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
