"""The options of `lora-kernels tune`."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Output
from ..options import Json


def tune(
    folder: Annotated[
        Path | None, typer.Option(help="Where the file is written; default: the user's cache, where dispatch reads it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Ranks up to 32 only.")] = False,
    json_file: Json = None,
) -> None:
    """Measure this GPU's tiles and dataflows in a few minutes; calls follow the measurements from then on."""
    from .run import run

    out = Output(json_file)
    out.write_json(run(out, folder, quick))
