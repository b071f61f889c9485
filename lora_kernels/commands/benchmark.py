"""`lora-kernels bench`: LoRA linear layers, forward + backward, beside the bare frozen layer and the peers of peers.py.

One row per case and variant. A case whose outputs or gradients fail the correctness gate reports no times at all.
"""

import functools
import time
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_name
from ..plan import backend_report
from . import peers
from .accuracy_gate import gate, truth
from .blocks import BlockProblem
from .cases import FORWARD, Case, Suite
from .console import Output, format_bytes
from .environment import environment
from .measure import Timing, cuda_graph, interleaved, kernel_launches, peak_bytes, saved_bytes
from .peers import BARE, HEADINGS, Variant

GRAPH_TOKENS = 512  # up to so many tokens launches cost more than kernels: on a GPU they are timed as CUDA graphs
CAPTION = (
    "GB/s: of reading and writing the frozen layers' x, W, y, dy and dx once. x bare: time over the bare frozen linear's. "
    "x PEFT and so on: how many times faster than that row. saved: kept by autograd for the backward pass beyond the inputs, "
    "parameters and buffers. peak: allocated at once in the call. launches: kernels, on a GPU; g: timed as a CUDA graph."
)
Refusals = list[dict[str, str]]


def run(
    suite: Suite,
    device: torch.device,
    repeats: int,
    output: Output,
    compare: tuple[str, ...] = ("peft",),
    lorafusion: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every case of `suite`: print a table for each as it is done, return header, rows, failures and refusals."""
    header = new_header(device, repeats, seed, output)
    reasons = {peer: peers.why_not(peer, lorafusion) for peer in compare}
    refusals: Refusals = [{"peer": peer, "case": "all", "reason": why} for peer, why in reasons.items() if why]
    print_refusals(refusals, output)
    present = tuple(peer for peer in compare if not reasons[peer])
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    result = {"header": header, "rows": rows, "failures": failures, "peers_not_measured": refusals}
    for case in suite.cases():
        case_rows, wrong, refused = measure_case(case, device, repeats, present, lorafusion, seed)
        rows += case_rows
        refusals += refused
        failures += [{"case": str(case), "reason": reason} for reason in wrong]
        if wrong:
            output.print(f"[bold red]{case}: no times reported, the correctness gate failed[/]")
            output.print("\n".join(f"  {reason}" for reason in wrong), markup=False)
        else:
            _print_case(case, case_rows, output)
        print_refusals(refused, output)
        output.save_progress(result)
    output.print(CAPTION)
    return result


def measure_case(
    case: Case,
    device: torch.device,
    repeats: int,
    compare: tuple[str, ...] = ("peft",),
    lorafusion: Path | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[str], Refusals]:
    """(rows, what the gate found wrong, peers that could not run with the reason): no rows where anything is wrong."""
    problem = BlockProblem.draw(case, device, seed)
    variants, refusals = [], []
    for name in ("bare", "ours", *compare):
        try:
            reason = peers.why_not_here(name, case)
            new = [] if reason else peers.variants(name, problem, lorafusion)
            for variant in new:
                problem.step(variant.module)()
        except Exception as error:  # another project's code: whatever it raises, the others are measured
            if name not in compare:
                raise
            new, reason = [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        variants += new
        if reason:
            refusals.append({"peer": name, "case": str(case), "reason": reason})
    wrong = [reason for variant in variants if variant.ours for reason in _gate(variant, seed)]
    return ([], wrong, refusals) if wrong else (_measure(problem, variants, device, repeats), [], refusals)


def _gate(variant: Variant, seed: int) -> list[str]:
    """The gate's reasons for each different layer of a variant of this package."""
    assert variant.ours is not None
    different = {(layer.in_features, layer.out_features): layer for layer in variant.ours.layers.values()}
    reasons = []
    for layer in different.values():
        weight = None
        if variant.nf4:
            layer, weight = peers.nf4_problem(layer)
        reasons += [f"{variant.name}: {reason}" for reason in gate(layer, seed, truth(layer, seed), weight)]
    return reasons


def _measure(problem: BlockProblem, variants: list[Variant], device: torch.device, repeats: int) -> list[dict[str, Any]]:
    case = problem.case
    steps = {variant.name: problem.step(variant.module) for variant in variants}
    timed, graphed = dict(steps), dict.fromkeys(steps, False)
    if device.type == "cuda" and case.M <= GRAPH_TOKENS:
        for name, step in steps.items():
            replay = cuda_graph(step, device)
            if not isinstance(replay, str):
                timed[name], graphed[name] = replay, True
    timings = interleaved(timed, repeats=repeats, warmup=min(3, repeats), device=device)
    rows = []
    for variant in variants:
        step = steps[variant.name]
        kept = [*problem.inputs, *variant.module.parameters(), *variant.module.buffers()]
        row = _row(case, variant, timings)
        call = step if case.passes == FORWARD else functools.partial(variant.module, *problem.inputs)
        row["saved_bytes"] = saved_bytes(call, exclude=kept)
        row["peak_bytes"] = peak_bytes(step, device)
        row["launches"] = kernel_launches(step, device)
        row["cuda_graph"] = graphed[variant.name]
        rows.append(row)
    return rows


def _row(case: Case, variant: Variant, timings: dict[str, Timing]) -> dict[str, Any]:
    timing = timings[variant.name]
    shape = case.shape
    return {
        "op": case.passes,
        "block": shape.block,
        **{"M": case.M, "K": shape.K, "N": shape.N, "kv": shape.kv or None, "R": case.R, "p": case.p},
        "dtype": dtype_name(case.dtype),
        "variant": variant.name,
        "backend": _backend(variant),
        "median_us": timing.median * 1e6,
        "p20_us": timing.p20 * 1e6,
        "p80_us": timing.p80 * 1e6,
        "tflops": case.flops(adapted=variant.name != BARE) / timing.median * 1e-12,
        "gbs": case.bytes() / timing.median * 1e-9,
        "times_bare": timing.median / timings[BARE].median,
        "faster_than": {name: other.median / timing.median for name, other in timings.items() if name in HEADINGS},
    }


def _backend(variant: Variant) -> str | None:
    """The backend that computes `variant`; None for what is not this package's."""
    if variant.ours is None:
        return None
    layer = next(iter(variant.ours.layers.values()))
    weight = peers.nf4_problem(layer)[1] if variant.nf4 else layer.W
    return next(row.backend for row in backend_report(layer.x, weight, layer.A, layer.B) if row.used)


def new_header(device: torch.device, repeats: int, seed: int, output: Output) -> dict[str, Any]:
    """What a run's numbers depend on, printed as one line."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    header = {**environment(), "device": _device_name(device), "time": started, "repeats": repeats, "seed": seed}
    output.print(_header_line(header))
    return header


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]["name"]


def _header_line(header: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in header["packages"].items() if version)
    return (
        f"{header['device']} · Python {header['python']} · {packages} · "
        f"lora_kernels {header['lora_kernels']} commit {header['commit']} · {header['cpu']['threads']} CPU threads"
    )


def print_refusals(refusals: Refusals, output: Output) -> None:
    """A line for each peer that was asked for and not measured."""
    for refusal in refusals:
        case = "" if refusal["case"] == "all" else f" ({refusal['case']})"
        output.print(f"peer not measured: {refusal['peer']}{case}: {refusal['reason']}", markup=False)


def _print_case(case: Case, rows: list[dict[str, Any]], output: Output) -> None:
    others = [name for name in HEADINGS if name in rows[0]["faster_than"]]
    columns = ["variant", "backend", "median µs", "p20–p80", "TFLOP/s", "GB/s", "x bare", *(HEADINGS[name] for name in others)]
    cells = [
        (
            row["variant"],
            row["backend"] or "",
            f"{row['median_us']:,.0f}{' g' if row['cuda_graph'] else ''}",
            f"{row['p20_us']:,.0f}–{row['p80_us']:,.0f}",
            f"{row['tflops']:.3g}",
            f"{row['gbs']:.3g}",
            f"{row['times_bare']:.2f}",
            *(f"{row['faster_than'][name]:.2f}" for name in others),
            format_bytes(row["saved_bytes"]),
            format_bytes(row["peak_bytes"]),
            "" if row["launches"] is None else row["launches"],
        )
        for row in rows
    ]
    output.table(f"{case.passes}, {case}", [*columns, "saved", "peak", "launches"], cells)
