"""The Triton kernels one by one: bandwidth of the side kernels against a device copy, and three ways to a product.

Side kernels: GB/s of the bytes they must move, and that over the GB/s of copying x. Products, forward and backward: the
bare vendor's (the floor), prefill and the vendor's accumulating product, and both in one kernel.
No time is reported for what fails the correctness gate, which runs with both dataflows; its float64 truth is computed once per
case. L2 is cold, variants are interleaved; medians with p20 and p80. After each case the JSON file is complete, so that a time
limit loses nothing.

    PYTHONPATH=. python bench/kernel_passes.py [--quick | --full] [--json FILE] [--device cpu|cuda] [--repeats N]

On a CPU it runs tiny shapes in Triton's interpreter (TRITON_INTERPRET=1), only to show that it runs.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.backends.products import add_product
from lora_kernels.backends.triton import compilation, tuning
from lora_kernels.backends.triton.kernels import lowrank_product
from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
from lora_kernels.backends.triton.kernels.grad_x import grad_x
from lora_kernels.backends.triton.kernels.magnitude import magnitude
from lora_kernels.backends.triton.kernels.magnitude_backward import magnitude_backward
from lora_kernels.backends.triton.kernels.prefill import prefill
from lora_kernels.backends.triton.kernels.project import project
from lora_kernels.backends.triton.kernels.row_norm import row_norm
from lora_kernels.cases.linear import Case, Problem, truth, wrong
from lora_kernels.cases.rule import Results
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.commands.timing import Timing, interleaved
from lora_kernels.dtypes import dtype_name

LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
LLAMA_70B = ((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192))
QWEN = ((3584, 18944), (18944, 3584), (5120, 5120), (5120, 27648))
FULL = (LLAMA_8B + LLAMA_70B + QWEN, (128, 512, 2048, 8192, 16384), (16, 64))  # shapes, tokens, ranks: an hour
USUAL = ((*LLAMA_8B, (8192, 8192)), (8192, 512), (16,))
QUICK = (((4096, 4096), (4096, 14336)), (8192,), (16,))
TINY = (((96, 64),), (32,), (8,))
SEED = 1


@dataclass(frozen=True)
class Row:
    """One variant of one case: `bytes` it must move, `flops` of its base product."""

    variant: str
    adapter: str
    M: int
    K: int
    N: int
    R: int
    p: float
    timing: Timing
    bytes: int
    flops: int
    over: float  # times the copy's bandwidth for side kernels, times the bare product's time for products

    @property
    def rate(self) -> str:
        seconds = self.timing.median
        return f"{self.flops / seconds * 1e-12:7.1f} TFLOP/s" if self.flops else f"{self.bytes / seconds * 1e-9:7.0f} GB/s   "

    def __str__(self) -> str:
        microseconds = [f"{1e6 * t:9.1f}" for t in (self.timing.median, self.timing.p20, self.timing.p80)]
        case = f"{self.M:6} {self.K:6}→{self.N:<6} r{self.R:<3} p={self.p:<4} {self.adapter:9}"
        return f"{self.variant:24} {case} {' '.join(microseconds)} µs {self.rate} {self.over:6.3f}"


@contextlib.contextmanager
def dataflow(name: str) -> Iterator[None]:
    """Every call takes dataflow `name`."""
    chosen, tuning.dataflow = tuning.dataflow, lambda a, W, direction: name
    try:
        yield
    finally:
        tuning.dataflow = chosen


def refused(problem: Problem, exact: Results) -> list[str]:
    """The dataflows whose results are not `exact` by the rule, or which do not run; why is printed."""
    names = []
    for name in ("prefill", "lowrank_product"):
        try:
            with use_backend("triton"), dataflow(name):
                reasons = wrong(problem, exact)
        except Exception as error:  # whatever one kernel does, the others are measured
            reasons = [f"{type(error).__name__}: {error}"]
        sys.stdout.write("".join(f"FAILED, not timed: {name}: {reason}\n" for reason in reasons))
        names += [name] if reasons else []
    return names


def variants(problem: Problem) -> dict[str, tuple[Callable[[], object], int, int]]:
    """name -> (call, bytes it must move, flops of its base product)."""
    x, W, A, B, dy, dropout = (
        problem.x.detach(),
        problem.W,
        problem.A.detach(),
        problem.B.detach(),
        problem.dy,
        problem.dropout(),
    )
    (M, K), (N, R), s = x.shape, B.shape, 2.0
    h, wide = torch.empty(M, R, dtype=A.dtype, device=x.device).normal_(), x.element_size()
    flops, X, Y, narrow = 2 * M * N * K, wide * M * K, wide * M * N, h.numel() * h.element_size()
    m, n, weights = problem.m, torch.ones(N, device=x.device), W.numel() * wide + R * (N + K) * A.element_size()

    def prefill_backward() -> Tensor:
        dx, _ = grad_x(None, (h,), (A,), dropout, x.dtype, need_x=True, need_As=(False,))
        return add_product(dx, dy, W)

    return {
        "copy": (lambda: x.clone(), 2 * X, 0),
        "project": (lambda: project(x, (A,), dropout), X + narrow, 0),
        "prefill": (lambda: prefill(h, B, s, None, x.dtype), Y + narrow, 0),
        "grad_dy": (lambda: grad_dy(dy, h, B, s, need_g=True, need_B=True, need_c=False), Y + 2 * narrow, 0),
        "grad_x": (lambda: grad_x(x, (h,), (A,), dropout, x.dtype, need_x=True, need_As=(True,)), 2 * X + narrow, 0),
        "row_norm": (lambda: row_norm(W, A, B, s, x.dtype), weights, 0),
        "magnitude": (lambda: magnitude(dy, m, n, None), 2 * Y, 0),
        "magnitude_backward": (lambda: magnitude_backward(dy, dy, m, n, need_v=True, need_m=True, need_c=False), 3 * Y, 0),
        "forward bare": (lambda: x @ W.T, 0, flops),
        "forward prefill": (lambda: add_product(prefill(h, B, s, None, x.dtype), x, W.T), 0, flops),
        "forward lowrank_product": (lambda: lowrank_product.forward(x, W, h, B, s, None), 0, flops),
        "backward bare": (lambda: dy @ W, 0, flops),
        "backward prefill": (prefill_backward, 0, flops),
        "backward lowrank_product": (lambda: lowrank_product.backward(dy, W, h, A, dropout), 0, flops),
    }


def measure(problem: Problem, adapter: str, repeats: int, without: list[str]) -> Iterator[Row]:
    """A row per variant whose dataflow is not in `without`."""
    (M, K), (N, R) = problem.x.shape, problem.B.shape
    calls = {name: variant for name, variant in variants(problem).items() if name.split()[-1] not in without}
    timings = interleaved({name: call for name, (call, _, _) in calls.items()}, repeats=repeats, device=problem.x.device)
    copy = calls["copy"][1] / timings["copy"].median
    for name, (_, moved, flops) in calls.items():
        timing = timings[name]
        floor = timings[f"{name.split()[0]} bare"].median if flops else 0.0
        over = timing.median / floor if flops else moved / timing.median / copy
        yield Row(name, adapter, M, K, N, R, problem.p, timing, moved, flops, over)


def cases(shapes: tuple, tokens: tuple, ranks: tuple, device: torch.device) -> Iterator[tuple[Problem, str, Results]]:
    """Each problem with the dtype of its adapters and its truth."""
    for K, N in shapes:
        for M in tokens:
            for R in ranks:
                for p in (0.0, 0.1):
                    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16  # the interpreter's bfloat16 is wrong
                    about = {"bias": False, "dora": True, "needs": ("x", "A", "B", "m"), "seed": SEED, "device": device}
                    case = Case(M, K, N, R, p, dtype=dtype, **about)
                    problem = case.draw(torch.Generator(device).manual_seed(SEED))
                    exact = truth(problem)
                    yield problem, dtype_name(dtype), exact
                    yield problem.with_adapters(torch.float32), "float32", exact


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="two shapes, one M, one rank")
    size.add_argument("--full", action="store_true", help="every shape, M and rank: about an hour")
    parser.add_argument("--json", type=Path, help="write every row and the environment there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)
    chosen = TINY if device.type == "cpu" else QUICK if options.quick else FULL if options.full else USUAL
    rows: list[Row] = []
    failed, header = 0, environment()
    names = f"{'variant':24} {'M':>6} {'K→N':>13} rank, p, adapters"
    sys.stdout.write(f"{names}        median       p20       p80    rate   over\n")
    for problem, adapter, exact in cases(*chosen, device):
        without = refused(problem, exact)
        failed += len(without)
        new = [] if "prefill" in without else list(measure(problem, adapter, options.repeats, without))
        sys.stdout.write("".join(f"{row}\n" for row in new))
        sys.stdout.flush()
        rows += new
        if options.json:
            rejected = [f"{key}: {reason}" for key, reason in compilation.rejected.items()]
            found = {"environment": header, "rejected": rejected, "rows": [asdict(row) for row in rows]}
            write_whole(options.json, json.dumps(found, indent=1), "--json")
    sys.stdout.write("".join(f"did not compile: {key}: {reason}\n" for key, reason in compilation.rejected.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
