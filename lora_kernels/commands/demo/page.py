"""The demo's page: loss, a step beside PEFT's, a sample before and after, the adapter, and where it ran."""

from collections.abc import Callable
from typing import Any

from ..bench.peers import OURS, PEFT
from ..console import format_bytes, format_seconds
from ..environment import environment_rows
from ..html import Bar, bars, page, paragraph, quotation, section, table
from ..line_chart import Line, line_chart
from ..pretrained import DEFAULT_MODEL
from .report import (
    LOSS_COLUMNS,
    SAVED,
    STEP_COLUMNS,
    adapter_lines,
    averaged,
    loss_rows,
    moving_average,
    step_rows,
    step_title,
)


def demo_page(result: dict[str, Any]) -> str:
    """What the command's JSON holds, as HTML."""
    losses, held_out, settings = result["losses"], result["held_out"], result["settings"]
    steps, samples, ranks = result["steps"], result["sample"], result.get("ranks", {})
    curves = [
        Line("training, each step", dict(enumerate(losses, start=1)), "faint"),
        Line(f"mean of {averaged(losses)} steps", moving_average(losses)),
        Line("held out", held_out, "second"),
    ]
    ran = [*environment_rows(result["environment"]), ("device", f"{result['device']}, {result['dtype']}")]
    return page(
        f"LoRA fine-tuning of {settings['model'] or DEFAULT_MODEL}",
        paragraph(_summary(result)),
        section("Loss", line_chart("nats per token", "step", curves), table(LOSS_COLUMNS, loss_rows(result))),
        section(
            "One training step, beside PEFT",
            bars("time, the median", [_bar(name, it["step"]["median"], format_seconds) for name, it in steps.items()]),
            bars(
                "memory saved for the backward pass",
                [_bar(name, it["saved_bytes"], format_bytes) for name, it in steps.items()],
            ),
            table(STEP_COLUMNS, step_rows(steps)),
            paragraph(f"{step_title(steps, settings)}. {SAVED}", quiet=True),
        ),
        section(
            "A sample",
            quotation("Prompt", result["prompt"]),
            *(quotation(f"Its continuation {when} training", sample) for when, sample in samples.items()),
        ),
        *([section("Ranks that AdaLoRA kept", table(("layer", "rank"), ranks.items()))] if ranks else []),
        section("The adapter", *map(paragraph, adapter_lines(result["round_trip"]))),
        section("Settings", table(("", "value"), ((name, "" if it is None else it) for name, it in settings.items()))),
        section("Environment", table(("", "value"), [*ran, ("seconds in all", f"{result['seconds']:.0f}")])),
    )


def _summary(result: dict[str, Any]) -> str:
    """What a reader of one sentence should know."""
    ours, peft = (result["steps"][name] for name in (OURS, PEFT))
    before, *_, after = result["held_out"].values()
    return (
        f"In {len(result['losses'])} steps the loss on held-out text went from {before:.3f} to {after:.3f} nats per token. "
        f"A step took {ours['step']['median'] / peft['step']['median']:.0%} of PEFT's time, and kept "
        f"{ours['saved_bytes'] / peft['saved_bytes']:.0%} of its memory for the backward pass."
    )


def _bar(name: str, value: float, label: Callable[[float], str]) -> Bar:
    return Bar(name, value, label(value), ours=name == OURS)
