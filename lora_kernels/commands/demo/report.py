"""What the demo shows at its end: the loss plot and the summary tables."""

from pathlib import Path
from typing import Any

from ..bench.peers import OURS, PEFT
from ..console import Output, format_bytes
from .ranks import print_ranks


def plot(losses: list[float], held_out: dict[int, float], path: Path) -> Path:
    """The training loss by step with its moving average, and the held-out loss, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    steps = range(1, len(losses) + 1)
    width = _averaged(losses)
    axes.plot(steps, losses, color="tab:blue", linewidth=0.8, alpha=0.4, label="training, each step")
    smooth = [_mean(losses[end - width : end]) for end in range(width, len(losses) + 1)]
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", linewidth=2, label=f"training, mean of {width} steps")
    axes.plot(list(held_out), list(held_out.values()), "o-", color="tab:red", linewidth=1.5, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def print_summary(result: dict[str, Any], output: Output) -> None:
    """Losses, samples, a training step beside PEFT's, and the files."""
    losses, held_out = result["losses"], list(result["held_out"].values())
    width = _averaged(losses)
    first, last = _mean(losses[:width]), _mean(losses[-width:])
    rows = [
        (f"training, first and last {width} steps", f"{first:.3f}", f"{last:.3f}"),
        ("held out, before and after", f"{held_out[0]:.3f}", f"{held_out[-1]:.3f}"),
    ]
    output.table("Loss (nats per token)", ("", "start", "end"), rows)
    output.print(f"Prompt  {result['prompt']!r}", markup=False)
    for when, sample in result["sample"].items():
        output.print(f"  {when:7}{sample!r}", markup=False)
    _print_steps(result["steps"], result["settings"], output)
    if "ranks" in result:
        print_ranks(result["ranks"], output)
    trip = result["round_trip"]
    size = format_bytes(trip["adapter_bytes"])
    output.print(f"adapter   {trip['adapter']} ({size}), in PEFT's format", markup=False)
    output.print("          load_adapter into a fresh base: logits bit-equal", markup=False)
    difference, base = trip["peft_relative_difference"], trip["base_relative_difference"]
    output.print(f"          PeftModel.from_pretrained: logits equal to {difference:.1e} of their norm", markup=False)
    told = "" if base > trip["peft_allowed_difference"] else "; too near to tell whether PEFT applies it: train longer"
    output.print(f"          (the base model's without an adapter: {base:.1e}{told})", markup=False)
    output.print(f"plot      {result['plot']}\ntotal     {result['seconds']:.0f} s on {result['device']}", markup=False)


def _print_steps(steps: dict[str, Any], settings: dict[str, Any], output: Output) -> None:
    peft = steps[PEFT]["step"]["median"]
    rows = []
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
    dtype = steps[OURS]["adapter_dtype"].removeprefix("torch.")
    title = (
        f"Forward + backward of one step, {steps[OURS]['tokens']} tokens; both: rank {settings['rank']}, "
        f"all linear layers, dropout {settings['dropout']}, {dtype} adapters"
    )
    caption = "saved: what autograd keeps between forward and backward for the whole model, without parameters."
    output.table(title, ("", "median ms", "p20–p80", "tokens/s", "x PEFT", "saved"), rows, caption, ("p20–p80", "tokens/s"))


def _averaged(losses: list[float]) -> int:
    """Steps to average over, a quarter of all: single steps differ by their text more than training moves them."""
    return max(1, len(losses) // 4)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
