"""The options of `lora-kernels convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import Output
from ..options import AdapterFormat, AdapterModel, Json


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .safetensors file, or PEFT's directory.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; for peft a directory.")],
    format: AdapterFormat,
    model: AdapterModel = None,
    json_file: Json = None,
) -> None:
    """Write an adapter in the format that another tool reads: peft, diffusers or kohya; the same function, to the bit."""
    from ..adapter_files import check_target, models_of, read, write

    out = Output(json_file)
    check_target(target, format)
    models = None if model is None else models_of(model)
    parts, metadata = read(source, models)
    write(out, parts, target, format, metadata, models)
