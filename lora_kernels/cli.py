"""`lora-kernels demo | bench | tune | report | memory`: the command line; each command's options are in its folder.

Heavy imports happen inside the commands.
"""

import sys
from typing import Annotated

import typer

from .commands.bench.options import bench
from .commands.console import CommandError
from .commands.demo.options import demo
from .commands.memory.options import memory
from .commands.report.options import report
from .commands.tune.options import tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fused LoRA linear layers for PyTorch: see them train, measure them, ask what runs where.",
)
for command in (demo, bench, tune, report, memory):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"lora_kernels {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    try:
        app(prog_name="lora-kernels")
    except CommandError as error:
        print(f"lora-kernels: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
