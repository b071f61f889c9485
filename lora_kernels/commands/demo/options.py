"""The options of `lora-kernels demo`."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Output
from ..options import Json, Rank, parse_output


def demo(
    model: Annotated[
        Path | None, typer.Option(help="Local Hugging Face causal LM directory; default: SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train on; default: Python's help topics.")] = None,
    output: Annotated[
        Path,
        typer.Option(
            parser=parse_output, metavar="<path>", help="Where the adapter (in PEFT's format) and the plot are written."
        ),
    ] = Path("lora-demo"),
    rank: Rank = 8,
    alpha: Annotated[float, typer.Option(help="lora_alpha; the adapter is scaled by alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Dropout probability of the adapters' input.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens of one step; default: 256 on a CPU, 4096 on a GPU.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    quantize: Annotated[
        str | None, typer.Option(help="nf4: adapted layers in 4 bits (QLoRA), beside PEFT + bitsandbytes.")
    ] = None,
    variant: Annotated[
        str,
        typer.Option(help="lora, dora, or adalora: ranks that fall from 1.5 times --rank to it, where they matter least."),
    ] = "lora",
    seed: Annotated[int, typer.Option(help="Seed of initialisation, data order and dropout.")] = 0,
    json_file: Json = None,
) -> None:
    """Fine-tune a small language model on real text, beside PEFT, and read the adapter back bit for bit."""
    from .run import run
    from .settings import Settings

    settings = Settings(
        model=model,
        text=text,
        output=output,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        steps=steps,
        tokens_per_step=tokens_per_step,
        lr=lr,
        seed=seed,
        quantize=quantize,
        variant=variant,
    )
    out = Output(json_file)
    out.write_json(run(settings, out))
