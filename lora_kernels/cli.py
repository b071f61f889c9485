"""`lora-kernels demo | bench | tune | report | memory | convert | merge`; each command's options are in its folder.

Heavy imports happen inside the commands.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .commands.bench.options import bench
from .commands.console import FAILED, CommandError
from .commands.convert.options import convert
from .commands.demo.options import demo
from .commands.examples import of_all, of_command
from .commands.failures import explained, give_up_output
from .commands.memory.options import memory
from .commands.merge.options import merge
from .commands.report.options import report
from .commands.tune.options import tune

INTERRUPTED = 130  # a shell's code for what ctrl-C ended


def _without_types(parameters: list[Any]) -> list[Any]:
    """Flags take no value: typer's help would show <bool> beside them."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Group(TyperGroup):
    """The options before the command."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))


class Command(TyperCommand):
    """One command. Ctrl-C is an error of it, with its line and code: typer would end with "Aborted!" and 1."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise CommandError("interrupted", INTERRUPTED) from error


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused LoRA linear layers for PyTorch: see them train, measure them, ask what runs where.",
    epilog=of_all(),
)
for command in (demo, bench, tune, report, memory, convert, merge):
    app.command(cls=Command, epilog=of_command(command.__name__))(command)


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
    """Run the command line. What goes wrong is one line on stderr; the exit code is 2 for bad input, 1 for a failure."""
    try:
        try:
            app(prog_name="lora-kernels")
        finally:
            if sys.stdout is not None:  # it is None where the shell closed it: `>&-`
                sys.stdout.flush()  # what it raises has a line too
    except BrokenPipeError:  # `| head` has seen enough
        give_up_output()
        sys.exit(FAILED)
    except Exception as error:
        failure = explained(error)
        if failure is None:
            raise
        give_up_output()
        print(f"lora-kernels: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
