"""4-bit weights on a GPU: dequantising, products of few and of some hundred tokens, QLoRA forward and backward.

dequantise   GB/s of codes, absmax and W, and that over the GB/s of copying W; bitsandbytes where it is installed
product      y with its adapter: skinny, loop and scratch (backends/nf4_paths.py) beside the bare product with a dense W,
             and the part of the time that the bytes alone would take at the copy's bandwidth
training     lora_linear forward and backward over 4-bit and dense W, over the time of the bare products

Nothing is timed whose values are wrong: dequantised W bit for bit, products and gradients by the tolerance rule. L2 is cold,
variants are interleaved; medians with p20 and p80. The rows tell which lines belong into nf4_paths.TABLE. The JSON file is
complete after each row.

    PYTHONPATH=. python bench/nf4_gpu.py [--quick] [--json FILE] [--device cpu|cuda] [--repeats N]

On a CPU it runs tiny shapes, only to show that it runs.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_kernels import lora_linear, use_backend
from lora_kernels.backends import nf4_paths
from lora_kernels.cases.linear import Case, Problem, plain, truth
from lora_kernels.cases.rule import Results, violations
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.commands.measure import peak_bytes
from lora_kernels.commands.timing import Timing, interleaved
from lora_kernels.functional.nf4 import dequantize_nf4, quantize_nf4
from lora_kernels.nf4 import NF4Weight
from lora_kernels.plan import load

LLAMA = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (8192, 8192), (8192, 28672))
FEW, SOME, MANY = (1, 2, 4, 8, 16), (32, 64, 128, 256, 512, 1024, 1536), (2048, 8192)
QUICK = {
    "cpu": (((128, 64),), (4,), (20,), (40,)),
    "cuda": (((4096, 4096), (4096, 14336)), (1, 4, 16), (64, 256, 1024), (8192,)),
}
R, SCALING, SEED, CHECKED = 16, 2.0, 1, 64
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One variant of one case; `over` is what the section's line in the module's docstring says."""

    section: str
    variant: str
    M: int
    K: int
    N: int
    p: float
    timing: Timing
    bytes: int
    over: float
    peak_bytes: int | None = None

    def __str__(self) -> str:
        microseconds = " ".join(f"{1e6 * t:9.1f}" for t in (self.timing.median, self.timing.p20, self.timing.p80))
        rate = f"{self.bytes / self.timing.median * 1e-9:7.0f} GB/s" if self.bytes else ""
        peak = f" peak {self.peak_bytes / 2**20:.1f} MiB" if self.peak_bytes is not None else ""
        case = f"{self.section:10} {self.variant:22} {self.M:6} {self.K:6}→{self.N:<6} p={self.p:<4}"
        return f"{case} {microseconds} µs {rate:13} {self.over:6.3f}{peak}"


Calls = dict[str, tuple[Callable[[], Any], int]]  # name -> call, bytes it must move


def available() -> dict[str, Any]:
    """The GPU backends that are there; the reason is printed for one that is not."""
    found = {}
    for name in ("cuda", "triton"):
        module = load(name, "linear")
        if isinstance(module, str):
            sys.stdout.write(f"without {name}: {module}\n")
        else:
            found[name] = module
    return found


def peer() -> Any:
    """bitsandbytes, or None."""
    return importlib.import_module("bitsandbytes") if importlib.util.find_spec("bitsandbytes") else None


failed: list[str] = []  # what was not timed, and why


def refuse(what: str) -> None:
    failed.append(what)
    sys.stdout.write(f"FAILED, not timed: {what}\n")


def wrong(call: Callable[[], Results], expected: Results, exact: Results) -> list[str]:
    """What is wrong with call()'s results; whatever one variant does, the others are measured."""
    try:
        return violations(call(), expected, exact, BF16)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]


# ---- dequantise ----


def dequantize_by(backend: str, W: NF4Weight, out: Tensor | None = None) -> Tensor:
    """W in bf16 by this backend."""
    with use_backend(backend):
        return dequantize_nf4(W, None if out is not None else BF16, out=out)


def layer_by(backend: str, problem: Problem, W: NF4Weight | Tensor) -> Tensor:
    """y by this backend."""
    with use_backend(backend), torch.no_grad():
        return lora_linear(problem.x, W, problem.A, problem.B, scaling=SCALING)


def plain_dequantize(W: NF4Weight, **options: Any) -> Tensor:
    """W by PyTorch operations."""
    with use_backend("torch"):
        return dequantize_nf4(W, **options)


def dequantise_calls(W: NF4Weight, flat: NF4Weight, modules: dict[str, Any]) -> Calls:
    dense, calls = torch.empty(W.shape, dtype=BF16, device=W.device), {}
    out = torch.empty_like(dense)
    calls["copy"] = (lambda: out.copy_(dense), 2 * dense.nbytes)
    for name, weight in (("nested", W), ("plain", flat)):
        moved = weight.nbytes + dense.nbytes
        if "cuda" in modules:
            calls[f"cuda {name}"] = (lambda weight=weight: dequantize_by("cuda", weight, out), moved)
        if "triton" in modules:
            calls[f"triton {name}"] = (lambda weight=weight: dequantize_by("triton", weight, out), moved)
    calls["torch nested"] = (lambda: plain_dequantize(W, out=out), W.nbytes + dense.nbytes)
    if (bitsandbytes := peer()) is not None:
        codes, state = W.to_bnb()
        calls["bitsandbytes nested"] = (lambda: bitsandbytes.functional.dequantize_4bit(codes, state), W.nbytes + dense.nbytes)
    return calls


def dequantise_rows(K: int, N: int, modules: dict[str, Any], device: torch.device, repeats: int) -> Iterator[Row]:
    values = weight_values(K, N, device)
    W, flat = quantize_nf4(values), quantize_nf4(values, double_quant=False)
    calls = dequantise_calls(W, flat, modules)
    for name in [name for name in calls if name != "copy"]:
        want = plain_dequantize(flat if "plain" in name else W, dtype=BF16)
        try:
            reason = "" if torch.equal(calls[name][0](), want) else "differs from lora_kernels.nf4"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            refuse(f"{name} {K}→{N} {reason}")
            del calls[name]
    timings = interleaved({name: call for name, (call, _) in calls.items()}, repeats=repeats, device=device)
    copied = calls["copy"][1] / timings["copy"].median
    for name, (_, moved) in calls.items():
        yield Row("dequantise", name, 0, K, N, 0.0, timings[name], moved, moved / timings[name].median / copied)


# ---- products ----


def product_calls(problem: Problem, W: NF4Weight, dense: Tensor, modules: dict[str, Any]) -> Calls:
    """y with its adapter by each path that can compute it."""
    x, A, B = (t.detach() for t in (problem.x, problem.A, problem.B))
    M, N = len(x), len(B)
    ends = x.nbytes + 2 * M * N + A.nbytes + B.nbytes
    calls: Calls = {"bare dense": (lambda: x @ dense.T, dense.nbytes + x.nbytes + 2 * M * N)}
    if "triton" in modules:
        triton = modules["triton"]
        unpack = "cuda" if "cuda" in modules else "triton"
        calls["scratch"] = (
            lambda: layer_by("triton", problem, dequantize_by(unpack, W)), W.nbytes + 2 * dense.nbytes + ends,
        )  # fmt: skip
        if max(FEW) < M and triton.nf4_product.refusal(x, W, R) is None:
            (h,) = triton.project(x, (A,), None)
            calls["loop, h given"] = (lambda: triton.nf4_product.product(x, W, h, B, SCALING, None), W.nbytes + ends)
        if "cuda" in modules and modules["cuda"].skinny_refusal(x, W, R) is None:
            (h,) = triton.project(x, (A,), None)
            calls["skinny, h given"] = (lambda: modules["cuda"].skinny(x, W, h, B, SCALING, None), W.nbytes + ends)
            calls["skinny"] = (lambda: layer_by("cuda", problem, W), W.nbytes + ends)
    if (bitsandbytes := peer()) is not None:
        codes, state = W.to_bnb()
        calls["bitsandbytes base"] = (lambda: bitsandbytes.matmul_4bit(x, codes.t(), state), W.nbytes + x.nbytes + 2 * M * N)
        calls["bitsandbytes + PEFT"] = (
            lambda: bitsandbytes.matmul_4bit(x, codes.t(), state) + (x @ A.T) @ B.T * SCALING, W.nbytes + ends,
        )  # fmt: skip
    return calls


def product_rows(
    K: int, N: int, tokens: tuple[int, ...], modules: dict[str, Any], device: torch.device, repeats: int
) -> Iterator[Row]:
    W = quantize_nf4(weight_values(K, N, device))
    dense = plain_dequantize(W, dtype=BF16)
    for M in tokens:
        problem = problem_of(M, K, N, 0.0, dense, device)
        calls = product_calls(problem, W, dense, modules)
        exact = truth(problem)["y"]
        expected = plain(problem)["y"]
        for name in [name for name in calls if name in ("scratch", "loop, h given", "skinny", "skinny, h given")]:
            if reasons := wrong(lambda call=calls[name][0]: {"y": call()}, {"y": expected}, {"y": exact}):
                refuse(f"{name} M={M} {K}→{N}: {reasons}")
                del calls[name]
        timings = interleaved({name: call for name, (call, _) in calls.items()}, repeats=repeats, device=device)
        copy = interleaved({"copy": lambda: dense.clone()}, repeats=5, device=device)["copy"].median
        for name, (call, moved) in calls.items():
            over = moved * copy / (2 * dense.nbytes) / timings[name].median
            yield Row("product", name, M, K, N, 0.0, timings[name], moved, over, peak_bytes(call, device))


# ---- training ----


def step(problem: Problem, W: Tensor | NF4Weight) -> dict[str, Tensor]:
    """y and the gradients of one layer."""
    A, B = problem.A.detach().requires_grad_(), problem.B.detach().requires_grad_()
    y = lora_linear(problem.x, W, A, B, scaling=SCALING, dropout_p=problem.p, seed=SEED)
    grads = torch.autograd.grad(y, (problem.x, A, B), problem.dy)
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True))


def training_rows(K: int, N: int, tokens: tuple[int, ...], device: torch.device, repeats: int) -> Iterator[Row]:
    W = quantize_nf4(weight_values(K, N, device))
    dense = plain_dequantize(W, dtype=BF16)
    for p in (0.0, 0.1):
        small = problem_of(CHECKED, K, N, p, dense, device)
        if reasons := wrong(lambda small=small: step(small, W), plain(small), truth(small)):
            refuse(f"training {K}→{N} p={p}: {reasons}")
            continue
        for M in tokens:
            problem = problem_of(M, K, N, p, dense, device)
            x, dy = problem.x.detach(), problem.dy
            calls = {
                "bare dense": lambda x=x, dy=dy: (x @ dense.T, dy @ dense),
                "lora dense": lambda problem=problem: step(problem, dense),
                "lora 4-bit": lambda problem=problem: step(problem, W),
            }
            timings = interleaved(calls, repeats=repeats, device=device)
            for name, call in calls.items():
                over = timings[name].median / timings["bare dense"].median
                yield Row("training", name, M, K, N, p, timings[name], 0, over, peak_bytes(call, device))


def weight_values(K: int, N: int, device: torch.device) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator(device).manual_seed(SEED), device=device).mul_(K**-0.5).to(BF16)


def problem_of(M: int, K: int, N: int, p: float, dense: Tensor, device: torch.device) -> Problem:
    needs = ("x", "A", "B")
    case = Case(M, K, N, R, p, SCALING, bias=False, dtype=BF16, needs=needs, seed=SEED, device=device)
    return replace(case.draw(torch.Generator(device).manual_seed(SEED)), W=dense)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, few numbers of tokens")
    parser.add_argument("--json", type=Path, help="write every row and the environment there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    device, modules = torch.device(options.device), available()
    tiny = options.quick or device.type == "cpu"
    shapes, few, some, many = QUICK[device.type] if tiny else (LLAMA, FEW, SOME, MANY)
    sys.stdout.write(f"{nf4_paths.table()}\n\n{'section':10} {'variant':22} {'M':>6} {'K→N':>13}" + " " * 10)
    sys.stdout.write("median       p20       p80    rate            over\n")
    rows, header = [], environment()
    for K, N in shapes:
        for section in (
            dequantise_rows(K, N, modules, device, options.repeats),
            product_rows(K, N, few + some, modules, device, options.repeats),
            training_rows(K, N, many, device, options.repeats),
        ):
            for row in section:
                rows.append(row)
                sys.stdout.write(f"{row}\n")
                sys.stdout.flush()
                if options.json:
                    found = {"environment": header, "failed": failed, "rows": [asdict(row) for row in rows]}
                    write_whole(options.json, json.dumps(found, indent=1), "--json")
    return 0 if rows and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
