"""A layer forward and backward by each GPU backend by name, before anything longer runs: three shapes, dense and NF4, two p.

y and every gradient are held to the one rule against float64 truth on the same device, once per case. Fails if a result is
wrong, if a kernel did not compile and another tile took its place, or if Triton cannot be used; what was rejected is printed.
The JSON file is complete after each case.

    PYTHONPATH=. python bench/smoke.py [--json FILE] [--device cpu|cuda]

On a CPU it runs tiny shapes in Triton's interpreter (TRITON_INTERPRET=1), only to show that it runs.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lora_kernels import use_backend
from lora_kernels.cases.linear import Case, Problem, truth, wrong
from lora_kernels.cases.rule import Results
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.plan import load

SHAPES = {  # M, K, N, R: few tokens, sizes that no tile divides, and the usual
    "cuda": ((4, 4096, 1024, 16), (257, 600, 264, 12), (8192, 4096, 4096, 16)),
    "cpu": ((4, 64, 48, 8), (17, 72, 40, 12), (32, 64, 64, 16)),
}
BACKENDS = {None: ("triton",), "nf4": ("triton", "cuda")}  # weight -> who computes over it on a GPU
Row = dict[str, Any]


def cases(device: torch.device) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter's bfloat16 is wrong
    for M, K, N, R in SHAPES[device.type]:
        for quant_type in BACKENDS:
            for p in (0.0, 0.1):
                yield Case(M, K, N, R, p, dtype=dtype, quant_type=quant_type, base_dtype=dtype, device=device)


def check(problem: Problem, exact: Results, backend: str) -> Row:
    """What is wrong with the backend's results, or why it cannot be used here."""
    row = {"case": str(problem.case), "weight": problem.case.quant_type or "dense", "backend": backend, "wrong": []}
    start = time.perf_counter()
    if isinstance(missing := load(backend, "linear"), str):
        return {**row, "seconds": 0.0, "wrong": [missing] if backend == "triton" else [], "left_out": missing}
    try:
        with use_backend(backend):
            row["wrong"] = wrong(problem, exact)
    except Exception as error:  # whatever one backend does, the others are tried
        row["wrong"] = [f"{type(error).__name__}: {error}"]
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def rejections() -> list[str]:
    """Tiles that did not compile, and GPUs that were given up for it."""
    triton = load("triton", "linear")
    if isinstance(triton, str):
        return []
    compilation = triton.gpu.compilation
    return [f"{key}: {why}" for found in (compilation.rejected, compilation.broken) for key, why in found.items()]


def line(row: Row) -> str:
    state = "; ".join(row["wrong"]) or row.get("left_out") or "right"
    return f"{row['backend']:7} {row['weight']:6} {row['case']:44} {row['seconds']:6.2f} s  {state}\n"


def main() -> int:
    """Check every case; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write every row and the environment there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    header, rows = environment(), []
    for case in cases(torch.device(options.device)):
        with use_backend("torch"):
            problem = case.draw(torch.Generator(options.device).manual_seed(case.seed))
            exact = truth(problem)
        for backend in BACKENDS[case.quant_type] if options.device == "cuda" else ("triton",):
            rows.append(check(problem, exact, backend))
            sys.stdout.write(line(rows[-1]))
            sys.stdout.flush()
            if options.json:
                found = {"environment": header, "rejected": rejections(), "rows": rows}
                write_whole(options.json, json.dumps(found, indent=1), "--json")
    sys.stdout.write("".join(f"rejected: {text}\n" for text in rejections()) or "no tile was rejected\n")
    return 1 if rejections() or any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
