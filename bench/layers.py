"""`lora-kernels bench` where typer and rich are not installed: layers beside the bare linear and the peers, in plain lines.

    PYTHONPATH=. python bench/layers.py [--suite NAME] [--shape KxN] [--tokens M] [--dropout P] [--variant dora] [--json FILE]

The options and the rows are the command's; the JSON file is complete after each case.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lora_kernels.commands.bench import layers, peers
from lora_kernels.commands.bench.suites import SUITES, Shape, choose_suite
from lora_kernels.commands.console import write_whole


class PlainOutput:
    """What commands.bench.layers prints and writes, by print()."""

    def __init__(self, json_file: Path | None):
        self.json_file = json_file

    def print(self, text: str = "", **style: Any) -> None:
        print(text, flush=True)

    def status(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], **layout: Any) -> None:
        lines = [list(map(str, row)) for row in (columns, *rows)]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        self.print(f"\n{title}")
        for cells in lines:
            self.print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())

    def save_progress(self, data: Any) -> None:
        if self.json_file:
            write_whole(self.json_file, json.dumps(data, indent=1, default=str) + "\n", "--json")


def shape(text: str) -> Shape:
    K, _, N = text.partition("x")
    return Shape(int(K), int(N))


def main() -> int:
    """Time the suite; exit code 1 where a result is wrong or nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="auto", choices=("auto", *SUITES))
    parser.add_argument("--shape", type=shape, action="append", default=[], metavar="KxN")
    parser.add_argument("--tokens", type=int, action="append", default=[])
    parser.add_argument("--dropout", type=float, action="append", default=[])
    parser.add_argument("--compare", type=peers.parse, default=("peft",), metavar="NAME,...")
    parser.add_argument("--variant", default="lora", choices=("lora", "dora"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    device = torch.device(options.device)
    axes = {"shapes": tuple(options.shape), "tokens": tuple(options.tokens), "dropouts": tuple(options.dropout)}
    suite = choose_suite(options.suite, device, dora=options.variant == "dora", **axes)
    result = layers.run(suite, device, options.repeats, PlainOutput(options.json), options.compare)  # type: ignore[arg-type]
    return 1 if result["failures"] or not result["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
