"""The options of `lora-kernels merge`."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import CommandError, Output
from ..options import AdapterFormat, AdapterModel, Json


def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="IN...", help=".safetensors files, or PEFT's directories.")],
    output: Annotated[Path, typer.Option(help="The file to write; for peft a directory.")],
    format: AdapterFormat,
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each IN in turn, repeated; default 1. Any finite number but 0.")
    ] = None,
    model: AdapterModel = None,
    json_file: Json = None,
) -> None:
    """Write the weighted sum of adapters as one, exactly: ranks add up, and no base model is read."""
    from ...models.lora_files.sums import weighted_sum
    from ..adapter_files import check_target, models_of, read, refusing, write

    weights = weight or [1.0] * len(sources)
    if len(weights) != len(sources) or not all(0 < abs(each) < float("inf") for each in weights):
        raise CommandError(f"--weight: got {weights}, expected a finite number but 0 for each of {len(sources)} files")
    out = Output(json_file)
    check_target(output, format)
    models = None if model is None else models_of(model)
    parts = [read(source, models)[0] for source in sources]
    with refusing():
        total = weighted_sum(list(zip(parts, weights, strict=True)))
    write(out, total, output, format, {}, models)
