"""What the options of several commands share: their declarations, their checks, and names as torch's objects."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import CommandError

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write results as JSON to FILE; - is stdout (tables go to stderr)."),
]
Html = Annotated[
    str | None,
    typer.Option("--html", metavar="FILE", help="Write results as one HTML page to FILE: bars, tables, environment."),
]
Rank = Annotated[int, typer.Option(help="Rank r of the adapters.")]
AdapterFormat = Annotated[str, typer.Option(help="peft, diffusers or kohya.")]
AdapterModel = Annotated[
    Path | None,
    typer.Option(help="Directory of the pipeline or model that flattened names are of; only configurations are read."),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
MAX_COUNT = 1 << 28  # of tokens, features, ranks: more is a slip of the hand, and bytes of their products would not fit 64 bits


def parse_output(text: str | Path) -> Path:
    """--output as a path. Raises CommandError for "": a Path of it is the working directory, which nobody asked for."""
    if text == "":
        raise CommandError("--output: got an empty path, expected a directory; the working directory is `.`")
    return Path(text)


def is_given(ctx: typer.Context, option: str) -> bool:
    """Whether the parameter `option` is on the command line, be it with its default value."""
    source = ctx.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def check_mode(ctx: typer.Context, modes: Mapping[str, tuple[str, ...]], mode: str) -> None:
    """Raise CommandError for an option that belongs to other modes than `mode`. modes: mode -> its own parameters.

    What is in no mode belongs to all of them.
    """
    for owner, options in modes.items():
        for option in options:
            if option not in modes[mode] and is_given(ctx, option):
                raise CommandError(f"--{option.replace('_', '-')}: is for `{owner}`, and `{mode}` does not use it")


def check_probability(option: str, value: float) -> None:
    """Raise CommandError unless it is one."""
    if not 0 <= value <= 1:
        raise CommandError(f"{option}: got {value}, expected a probability in [0, 1]")


def check_count(option: str, value: int, low: int = 1, high: int = MAX_COUNT) -> None:
    """Raise CommandError unless low <= value <= high."""
    if value < low:
        raise CommandError(f"{option}: got {value}, expected at least {low}")
    if value > high:
        raise CommandError(f"{option}: got {value}, expected at most {high}")


def parse_device(name: str | None) -> Any:
    """The torch.device; without a name cuda where there is one. Raises CommandError for one that is not here."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device: got {name!r}, expected cpu, cuda or cuda:INDEX")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device: got {name!r}, but torch {torch.__version__} sees no CUDA device; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device: got {name!r}, expected an index below {torch.cuda.device_count()}")
    return device


def parse_dtype(name: str, option: str = "--dtype") -> Any:
    """The torch.dtype. Raises CommandError for another name than those of the benchmark's dtypes."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise CommandError(f"{option}: got {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


def parse_variant(name: str, *known: str) -> str:
    """Raises CommandError unless it is one of those known."""
    if name not in known:
        raise CommandError(f"--variant: got {name}, expected {' or '.join([', '.join(known[:-1]), known[-1]])}")
    return name


def parse_quantize(name: str | None) -> str | None:
    """Raises CommandError unless it is nf4, or left out."""
    if name not in (None, "nf4"):
        raise CommandError(f"--quantize: got {name!r}, expected nf4, or no --quantize")
    return name
