"""What the options of several commands share: their declarations, and names of devices and dtypes as torch's objects."""

from typing import Annotated, Any

import typer

from .console import CommandError

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write results as JSON to FILE; - is stdout (tables go to stderr)."),
]
Rank = Annotated[int, typer.Option(help="Rank r of the adapters.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]


def parse_device(name: str | None) -> Any:
    """The torch.device; without a name cuda where there is one. Raises CommandError for one that is not here."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise CommandError(f"--device: got {name!r}, expected cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device: got {name!r}, but torch {torch.__version__} sees no CUDA device; use cpu")
    return torch.device(name)


def parse_dtype(name: str) -> Any:
    """The torch.dtype. Raises CommandError for another name than those of the benchmark's dtypes."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise CommandError(f"--dtype: got {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]
