"""Plots of result files as SVG, the same bytes for the same rows and the same matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from result_files import case_name, cases

from lora_kernels.commands.bench.peers import BARE, OURS, OURS_FUSED, PEFT
from lora_kernels.commands.console import format_bytes

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "lora_kernels", "svg.fonttype": "none", "font.size": 9})


def draw(kind: str, run: dict[str, Any], path: Path) -> None:
    """Write the plot of a run of one of the kinds below."""
    draw_axes, height = {
        "layer": (_ratios, 0.28), "model": (_ratios, 0.4), "memory": (_memory, 0.16), "fitness": (_fitness, 0.0)
    }[kind]  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(7.5, max(3.0, height * len(run["rows"]))), constrained_layout=True)
    draw_axes(axes, run)
    figure.legend(loc="outside upper center", ncols=2 if kind == "memory" else 4, fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_picture(source: str, cases: list[dict[str, dict[str, Any]]], path: Path) -> None:
    """Write README's picture: for each case time over the bare linear's, and bytes saved for the backward pass over PEFT's."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 0.6 + 0.5 * len(cases)), sharey=True, constrained_layout=True)
    for position, rows in enumerate(cases):
        ours, theirs = rows.get(OURS_FUSED, rows[OURS]), rows[PEFT]
        for row, shift, color in ((theirs, -0.2, "C7"), (ours, 0.2, "C0")):
            key = "median_s" if "median_s" in row else "median_us"
            over = (row[key] / rows[BARE][key], row["saved_bytes"] / theirs["saved_bytes"])
            texts = (f"{over[0]:.2f}", format_bytes(row["saved_bytes"]))
            for axes, value, text in zip(panels, over, texts, strict=True):
                axes.barh(position + shift, value, height=0.38, color=color)
                axes.text(value, position + shift, f" {text}", va="center", fontsize=7)
    for color, label in (("C7", PEFT), ("C0", OURS)):
        panels[0].barh(0, 0, color=color, label=label)
    for axes, label in zip(panels, ("time, × frozen layers alone", "saved for the backward pass, × PEFT's"), strict=True):
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.25 * axes.get_xlim()[1])  # room for the numbers
    panels[0].axvline(1, color="black", linewidth=0.8)
    panels[0].set_yticks(range(len(cases)), [case_name(rows.get(OURS_FUSED, rows[OURS])) for rows in cases])
    panels[0].invert_yaxis()
    figure.legend(
        loc="outside upper center", ncols=2, fontsize=8, title=f"training with dropout, CPU ({source})", title_fontsize=8
    )
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _ratios(axes: Axes, run: dict[str, Any]) -> None:
    """Bars from the top: time over the bare frozen linear's, with p20 and p80, the rows of a case together."""
    colors = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(row["variant"] for row in run["rows"]))}
    position, ticks = 0.0, []
    for name, case in cases(run["rows"]):
        key = "s" if "median_s" in case[0] else "us"
        bare = next(row[f"median_{key}"] for row in case if row["variant"] == BARE)
        others = [row for row in case if row["variant"] != BARE]
        ticks.append((position + (len(others) - 1) / 2, name))
        for row in others:
            value, low, high = (row[f"{mark}_{key}"] / bare for mark in ("median", "p20", "p80"))
            spread = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.barh(position, value, xerr=spread, color=colors[row["variant"]], height=0.85, error_kw={"linewidth": 0.8})
            position += 1
        position += 0.7
    for variant, color in colors.items():
        if variant != BARE:
            axes.barh(0, 0, color=color, label=variant)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.invert_yaxis()
    axes.set_xlabel("time over the bare frozen linear's (1 = LoRA for nothing)")


def _memory(axes: Axes, run: dict[str, Any]) -> None:
    """Peak bytes of a step over the tokens of a sequence."""
    lines: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in run["rows"]:
        lines.setdefault((row["variant"], row["checkpointing"]), []).append((row["tokens"], row["peak_bytes"] / 2**20))
    for number, ((variant, checkpointing), points) in enumerate(lines.items()):
        width = 1 + 0.6 * (len(lines) - 1 - number)  # a line over an equal one leaves its edges to be seen
        style = "--" if checkpointing else "-"
        label = f"{variant}{', checkpointed' if checkpointing else ''}"
        axes.plot(*zip(*points, strict=True), f"o{style}", label=label, linewidth=width, markersize=width + 2)
    axes.set(xlabel="tokens", ylabel="peak of a training step, MiB", title=f"{run['model']}, r={run['R']}, p={run['p']:g}")
    axes.grid(alpha=0.3)


def _fitness(axes: Axes, run: dict[str, Any]) -> None:
    """The mean fitness of each step's population."""
    for row in run["rows"]:
        axes.plot(row["fitness"], label=f"rank {row['rank']}, {row['population']} members, {row['dtype']}")
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy, mean of the population")
