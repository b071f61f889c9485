"""What the demo shows at its end: the loss plot and the summary tables."""

from pathlib import Path
from typing import Any

from ...models.atomic_files import all_or_nothing
from ..bench.peers import OURS, PEFT
from ..console import Output, format_bytes
from .ranks import print_ranks

LOSS_COLUMNS = ("", "start", "end")
STEP_COLUMNS = ("", "median ms", "p20–p80", "tokens/s", "x PEFT", "saved")
SAVED = "saved: what autograd keeps between forward and backward for the whole model, without parameters."


def plot(losses: list[float], held_out: dict[int, float], path: Path) -> Path:
    """The training loss by step with its moving average, and the held-out loss, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    steps = range(1, len(losses) + 1)
    smooth = moving_average(losses)
    axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.4, label="training, each step")
    label = f"training, mean of {averaged(losses)} steps"
    axes.plot(list(smooth), list(smooth.values()), color="tab:blue", linewidth=2, label=label)
    axes.plot(list(held_out), list(held_out.values()), "o-", color="tab:red", linewidth=1.5, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    with all_or_nothing(path.parent) as folder:
        figure.savefig(folder / path.name, dpi=120)
    pyplot.close(figure)
    return path


def print_summary(result: dict[str, Any], output: Output) -> None:
    """Losses, samples, a training step beside PEFT's, and the files."""
    output.table("Loss (nats per token)", LOSS_COLUMNS, loss_rows(result))
    output.print(f"Prompt  {result['prompt']!r}", markup=False)
    for when, sample in result["sample"].items():
        output.print(f"  {when:7}{sample!r}", markup=False)
    steps = result["steps"]
    output.table(step_title(steps, result["settings"]), STEP_COLUMNS, step_rows(steps), SAVED, ("p20–p80", "tokens/s"))
    if "ranks" in result:
        print_ranks(result["ranks"], output)
    first, *others = adapter_lines(result["round_trip"])
    output.print(f"adapter   {first}", *others, sep="\n          ", markup=False)
    output.print(f"plot      {result['plot']}\npage      {result['page']}", markup=False)
    output.print(f"total     {result['seconds']:.0f} s on {result['device']}", markup=False)


def adapter_lines(trip: dict[str, Any]) -> list[str]:
    """Where the adapter is, and what became of it here and in PEFT."""
    difference, base = trip["peft_relative_difference"], trip["base_relative_difference"]
    told = "" if base > trip["peft_allowed_difference"] else "; too near to tell whether PEFT applies it: train longer"
    return [
        f"{trip['adapter']} ({format_bytes(trip['adapter_bytes'])}), in PEFT's format",
        "load_adapter into a fresh base: logits bit-equal",
        f"PeftModel.from_pretrained: logits equal to {difference:.1e} of their norm",
        f"(the base model's without an adapter: {base:.1e}{told})",
    ]


def loss_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of LOSS_COLUMNS."""
    means, held_out = list(moving_average(result["losses"]).values()), list(result["held_out"].values())
    return [
        (f"training, first and last {averaged(result['losses'])} steps", f"{means[0]:.3f}", f"{means[-1]:.3f}"),
        ("held out, before and after", f"{held_out[0]:.3f}", f"{held_out[-1]:.3f}"),
    ]


def step_rows(steps: dict[str, Any]) -> list[tuple[str, ...]]:
    """The cells of STEP_COLUMNS."""
    peft = steps[PEFT]["step"]["median"]
    rows: list[tuple[str, ...]] = []
    for name, measured in steps.items():
        timing = measured["step"]
        rows.append(
            (
                name,
                f"{timing['median'] * 1e3:,.0f}",
                f"{timing['p20'] * 1e3:,.0f}–{timing['p80'] * 1e3:,.0f}",
                f"{measured['tokens'] / timing['median']:,.0f}",
                f"{peft / timing['median']:.2f}",
                format_bytes(measured["saved_bytes"]),
            )
        )
    return rows


def step_title(steps: dict[str, Any], settings: dict[str, Any]) -> str:
    """What both did in the step that was timed."""
    dtype = steps[OURS]["adapter_dtype"].removeprefix("torch.")
    return (
        f"Forward + backward of one step, {steps[OURS]['tokens']} tokens; both: rank {settings['rank']}, "
        f"all linear layers, dropout {settings['dropout']}, {dtype} adapters"
    )


def averaged(losses: list[float]) -> int:
    """Steps to average over, a quarter of all: single steps differ by their text more than training moves them."""
    return max(1, len(losses) // 4)


def moving_average(losses: list[float]) -> dict[int, float]:
    """Step -> the mean loss of so many steps up to it, from the first step that has as many."""
    width = averaged(losses)
    return {end: sum(losses[end - width : end]) / width for end in range(width, len(losses) + 1)}
