"""Each operation forward and backward by each GPU backend by name, before anything longer runs: a layer in three
shapes and with two p, and q, k and v, and an MLP, in one; dense and NF4.

Results and every gradient are held to the one rule against float64 truth on the same device, once per case. Fails if one
is wrong, if a kernel did not compile and another tile took its place, or if Triton cannot be used; what was rejected is
printed. The JSON file is complete after each case.

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
from lora_kernels.cases import glu_mlp, linear, members
from lora_kernels.cases.linear import Case, Problem
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer, MembersCase, MembersProblem
from lora_kernels.cases.rule import Results
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.plan import load

SHAPES = {  # M, K, N, R: few tokens, sizes that no tile divides, and the usual
    "cuda": ((4, 4096, 1024, 16), (257, 600, 264, 12), (8192, 4096, 4096, 16)),
    "cpu": ((4, 64, 48, 8), (17, 72, 40, 12), (32, 64, 64, 16)),
}
BLOCKS = {"cuda": (257, 4096, 1024, 14336, 16), "cpu": (17, 32, 16, 72, 8)}  # M, hidden, key-value features, intermediate, R
BACKENDS = {None: ("triton",), "nf4": ("triton", "cuda")}  # weight -> who computes over it on a GPU
Row = dict[str, Any]


def cases(device: torch.device) -> Iterator[Case]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter's bfloat16 is wrong
    for M, K, N, R in SHAPES[device.type]:
        for quant_type in BACKENDS:
            for p in (0.0, 0.1):
                yield Case(M, K, N, R, p, dtype=dtype, quant_type=quant_type, base_dtype=dtype, device=device)


def blocks(device: torch.device) -> Iterator[MembersCase]:
    """q and k with adapters beside a plain v, and an MLP, with dropout."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    M, K, kv, I, R = BLOCKS[device.type]  # noqa: E741
    for quant_type in BACKENDS:
        about: dict[str, Any] = {"M": M, "K": K, "p": 0.1, "dtype": dtype, "device": device}
        q, k, v, inner = (Layer(N, r, quant_type=quant_type) for N, r in ((K, R), (kv, R), (kv, None), (I, R)))
        yield GroupCase(members=(q, k, v), **about)
        yield glu_mlp.Case(I=I, N=K, gate=inner, up=inner, down=q, **about)


def kind(case: Case | MembersCase) -> tuple[str | None, Any]:
    """(quant_type, the module that judges it) of a case."""
    if isinstance(case, Case):
        return case.quant_type, linear
    return next(layer.quant_type for _, layer in case.layers().values()), members


def check(problem: Problem | MembersProblem, exact: Results, backend: str) -> Row:
    """What is wrong with the backend's results, or why it cannot be used here."""
    quant_type, judge = kind(problem.case)
    row = {"case": str(problem.case), "weight": quant_type or "dense", "backend": backend, "wrong": []}
    start = time.perf_counter()
    if isinstance(missing := load(backend, "glu_mlp" if isinstance(problem.case, glu_mlp.Case) else "linear"), str):
        return {**row, "seconds": 0.0, "wrong": [missing] if backend == "triton" else [], "left_out": missing}
    try:
        with use_backend(backend):
            row["wrong"] = judge.wrong(problem, exact)
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
    return f"{row['backend']:7} {row['weight']:6} {row['case']:56} {row['seconds']:6.2f} s  {state}\n"


def main() -> int:
    """Check every case; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write every row and the environment there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    header, rows = environment(), []
    device = torch.device(options.device)
    for case in (*cases(device), *blocks(device)):
        quant_type, judge = kind(case)
        with use_backend("torch"):
            problem = case.draw(torch.Generator(device).manual_seed(case.seed))
            exact = judge.truth(problem)
        several = judge is linear and device.type == "cuda"  # who else has the operation and can be asked for
        for backend in BACKENDS[quant_type] if several else ("triton",):
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
