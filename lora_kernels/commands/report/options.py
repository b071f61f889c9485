"""The options of `lora-kernels report`."""

from typing import Annotated

import typer

from ..console import Output
from ..options import Json, check_count, check_mode

MODES: dict[str, tuple[str, ...]] = {"report": (), "report --kernels": ("kernels", "target", "dtypes", "shape", "tokens")}


def report(
    ctx: typer.Context,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show the Triton kernels instead: machine code, bytes per pass, predicted times.")
    ] = False,
    target: Annotated[str, typer.Option(help="With --kernels: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120.")] = "sm_90",
    dtypes: Annotated[str, typer.Option(help="With --kernels: base and adapters, as in 'bf16 fp32'.")] = "bf16 bf16",
    shape: Annotated[str, typer.Option(help="With --kernels: KxN, in-features x out-features.")] = "4096x4096",
    tokens: Annotated[int, typer.Option(help="With --kernels: tokens M.")] = 8192,
    json_file: Json = None,
) -> None:
    """Show versions, devices and CPU capabilities, and for each backend whether it is used here, or why not."""
    check_mode(ctx, MODES, "report --kernels" if kernels else "report")
    if not kernels:
        from .backends import run

        out = Output(json_file)
        out.write_json(run(out))
        return
    from ..layer_shapes import parse_shape
    from .kernels import run as run_kernels

    check_count("--tokens", tokens)
    K, N = parse_shape(shape)
    out = Output(json_file)
    out.write_json(run_kernels(tokens, K, N, target, dtypes, out))
