"""`lora-kernels bench`: forward + backward of one LoRA linear layer beside the bare frozen layer and PEFT.

One row per case and variant. A case whose outputs or gradients fail the correctness gate reports no times at all.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backend_report
from ..modules import LoRALinear
from .accuracy_gate import Problem, gate, truth
from .console import CommandError, Output, format_bytes
from .environment import environment
from .measure import Timing, interleaved, peak_bytes, saved_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BARE, PEFT = "bare frozen linear", "PEFT eager"
OURS, OURS_FP32, PEFT_FP32 = "lora_kernels", "lora_kernels, fp32 adapters", "PEFT eager, fp32 adapters"
CAPTION = (
    "x bare: time over the bare frozen linear's. x PEFT: how many times faster than PEFT eager with adapters of x's "
    "dtype. saved: kept by autograd for the backward pass beyond x and the parameters. peak: allocated at once in "
    "forward + backward."
)


@dataclass(frozen=True)
class Case:
    """One layer K -> N with rank R and dropout p on M tokens."""

    M: int
    K: int
    N: int
    R: int
    p: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.K}→{self.N} M={self.M} r={self.R} p={self.p} {str(self.dtype).removeprefix('torch.')}"

    def flops(self, adapted: bool) -> int:
        """Multiply-adds count two. x·Wᵀ and dy·W; with an adapter also h, h·Bᵀ, g, g·A, dA, dB."""
        base = 4 * self.M * self.K * self.N
        return base + 6 * self.M * self.R * (self.K + self.N) if adapted else base


@dataclass(frozen=True)
class Suite:
    """The cases of a run: every combination of its axes."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]

    def cases(self) -> Iterator[Case]:
        axes = (self.dtypes, self.dropouts, self.ranks, self.tokens, self.shapes)
        for dtype, p, R, M, (K, N) in itertools.product(*axes):
            yield Case(M, K, N, R, p, dtype)


LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # q,o  k,v  gate,up  down
SUITES = {
    "small": Suite(((2048, 2048),), (2048,), (8,), (0.1,), (torch.float32,)),
    "llama": Suite(LLAMA_8B, (2048, 8192), (16,), (0.0, 0.1), (torch.bfloat16,)),
}


def choose_suite(name: str, device: torch.device, **axes: tuple[Any, ...]) -> Suite:
    """The suite `name` ("auto": llama on a GPU, small on a CPU) with the axes that are given in place of its own.

    Raises CommandError for an unknown suite and for axes that make no layer.
    """
    if name == "auto":
        name = "llama" if device.type == "cuda" else "small"
    if name not in SUITES:
        raise CommandError(f"--suite: got {name!r}, expected one of {', '.join(('auto', *SUITES))}")
    suite = replace(SUITES[name], **{axis: values for axis, values in axes.items() if values})
    for case in suite.cases():
        if case.M < 1:
            raise CommandError(f"--tokens: got {case.M}, expected at least 1")
        if not 1 <= case.R <= min(case.K, case.N):
            expected = f"1 to {min(case.K, case.N)} for the shape {case.K}x{case.N}"
            raise CommandError(f"--rank: got {case.R}, expected {expected}")
        if not 0 <= case.p <= 1:
            raise CommandError(f"--dropout: got {case.p}, expected a probability in [0, 1]")
    return suite


def run(suite: Suite, device: torch.device, repeats: int, output: Output, seed: int = 0) -> dict[str, Any]:
    """Measure every case of `suite`: print a table for each as it is done, return header, rows, refusals and peers."""
    refused_peers = {} if importlib.util.find_spec("peft") else {"PEFT": "not installed; run `pip install peft`"}
    header = {**environment(), "device": _device_name(device), "repeats": repeats, "seed": seed}
    output.print(_header_line(header))
    for peer, why in refused_peers.items():
        output.print(f"peer not measured: {peer}: {why}", markup=False)
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for case in suite.cases():
        case_rows, reasons = measure_case(case, device, repeats, with_peft=not refused_peers, seed=seed)
        rows += case_rows
        failures += [{"case": str(case), "reason": reason} for reason in reasons]
        if reasons:
            output.print(f"[bold red]{case}: no times reported, the correctness gate failed[/]")
            output.print("\n".join(f"  {reason}" for reason in reasons), markup=False)
        else:
            _print_case(case, case_rows, output)
    output.print(CAPTION)
    return {"header": header, "rows": rows, "failures": failures, "peers_not_measured": refused_peers}


def measure_case(
    case: Case, device: torch.device, repeats: int, with_peft: bool, seed: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, []) of one case, or ([], reasons) where the gate fails."""
    problem = Problem.draw(case.M, case.K, case.N, case.R, case.p, case.dtype, device, seed)
    problems = {OURS: problem}
    if case.dtype != torch.float32:
        problems[OURS_FP32] = problem.with_adapters(torch.float32)
    exact = truth(problem, seed)  # float32 adapters have the same values, so the same truth
    reasons = [f"{name}: {reason}" for name, ours in problems.items() for reason in gate(ours, seed, exact)]
    if reasons:
        return [], reasons
    layers: dict[str, nn.Module] = {BARE: _frozen(problem)}
    layers.update({name: _ours(ours) for name, ours in problems.items()})
    if with_peft:
        layers.update({name.replace(OURS, PEFT): _peft(ours) for name, ours in problems.items()})
    steps = {name: _step(layer, problem) for name, layer in layers.items()}
    timings = interleaved(steps, repeats=repeats, warmup=3, device=device)
    rows = []
    for name, layer in layers.items():
        saved = saved_bytes(functools.partial(layer, problem.x), exclude=[problem.x])
        peak = peak_bytes(steps[name], device)
        rows.append(_row(case, name, timings, saved, peak, _backend(name, problems)))
    return rows, []


def _row(case: Case, name: str, timings: dict[str, Timing], saved: int, peak: int, backend: str | None) -> dict[str, Any]:
    timing = timings[name]
    return {
        "op": "forward+backward",
        **{axis: getattr(case, axis) for axis in ("M", "K", "N", "R", "p")},
        "dtype": str(case.dtype).removeprefix("torch."),
        "variant": name,
        "backend": backend,
        "median_us": timing.median * 1e6,
        "p20_us": timing.p20 * 1e6,
        "p80_us": timing.p80 * 1e6,
        "tflops": case.flops(adapted=name != BARE) / timing.median * 1e-12,
        "times_bare": timing.median / timings[BARE].median,
        "times_peft": timings[PEFT].median / timing.median if PEFT in timings else None,
        "saved_bytes": saved,
        "peak_bytes": peak,
    }


def _frozen(problem: Problem) -> nn.Linear:
    linear = nn.Linear(problem.in_features, problem.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    return linear


def _ours(problem: Problem) -> nn.Module:
    layer = LoRALinear.from_linear(_frozen(problem), r=problem.r, lora_alpha=problem.lora_alpha, lora_dropout=problem.p)
    return _with_adapter(layer, problem)


def _peft(problem: Problem) -> nn.Module:
    """PEFT's own layer, with its adapters in the dtype of `problem`'s: float32 is PEFT's default for 16-bit models."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=problem.r, lora_alpha=problem.lora_alpha, lora_dropout=problem.p, target_modules=["linear"], bias="none"
    )
    model = nn.ModuleDict({"linear": _frozen(problem)})
    promote = problem.A.dtype == torch.float32 and problem.x.dtype != torch.float32
    get_peft_model(model, config, autocast_adapter_dtype=promote)  # exchanges the layer in place
    return _with_adapter(model["linear"], problem)


def _with_adapter(layer: Any, problem: Problem) -> nn.Module:
    """`layer` in training mode with copies of `problem`'s adapter."""
    for adapters, value in ((layer.lora_A, problem.A), (layer.lora_B, problem.B)):
        adapter = adapters["default"]
        if isinstance(adapter, nn.Linear):  # PEFT keeps a module, this package a parameter
            adapter.weight = nn.Parameter(value.clone())
        else:
            adapters["default"] = nn.Parameter(value.clone())
    return layer.train()


def _step(layer: nn.Module, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    wanted = [problem.x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(problem.x), wanted, problem.dy)


def _backend(name: str, problems: dict[str, Problem]) -> str | None:
    """The backend that computes variant `name`; None for what is not ours."""
    if name not in problems:
        return None
    ours = problems[name]
    return next(row.backend for row in backend_report(ours.x, ours.W, ours.A, ours.B) if row.used)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]["name"]


def _header_line(header: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in header["packages"].items() if version)
    return (
        f"{header['device']} · Python {header['python']} · {packages} · "
        f"lora_kernels {header['lora_kernels']} commit {header['commit']} · {header['cpu']['threads']} CPU threads"
    )


def _print_case(case: Case, rows: list[dict[str, Any]], output: Output) -> None:
    columns = ("variant", "backend", "median µs", "p20–p80", "TFLOP/s", "x bare", "x PEFT", "saved", "peak")
    cells = [
        (
            row["variant"],
            row["backend"] or "",
            f"{row['median_us']:,.0f}",
            f"{row['p20_us']:,.0f}–{row['p80_us']:,.0f}",
            f"{row['tflops']:.3g}",
            f"{row['times_bare']:.2f}",
            f"{row['times_peft']:.2f}" if row["times_peft"] else "",
            format_bytes(row["saved_bytes"]),
            format_bytes(row["peak_bytes"]),
        )
        for row in rows
    ]
    output.table(f"forward + backward, {case}", columns, cells)
