"""`lora-kernels bench`: LoRA linear layers, forward + backward, beside the bare frozen layer and the peers of peers.py.

One row per case and variant. A case whose outputs or gradients fail the correctness gate reports no times at all.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from ...cases import linear, members
from ...cases.linear import Problem
from ...cases.rule import Results
from ..console import Output, first_line
from ..measure import kernel_launches, peak_bytes, saved_bytes
from ..timing import cuda_graph, interleaved
from . import peers
from .blocks import BlockProblem
from .header import Refusals, new_header, print_refusals
from .host import host_times
from .peers import Variant
from .rows import new_row, print_case
from .suites import FORWARD, Suite, Workload

GRAPH_TOKENS = 512  # up to so many tokens launches cost more than kernels: on a GPU they are timed as CUDA graphs
CAPTION = (
    "GB/s: of reading and writing the frozen layers' x, W, y, dy and dx once. x bare: time over the bare frozen linear's. "
    "x PEFT and so on: how many times faster than that row. saved: kept by autograd for the backward pass beyond the inputs, "
    "parameters and buffers. peak: allocated at once in the call. host: of the same call on 8 tokens of 64 features, where "
    "that is nothing but what a call costs the host. launches: kernels, on a GPU; g: timed as a CUDA graph."
)


def run(
    suite: Suite,
    device: torch.device,
    repeats: int,
    output: Output,
    compare: tuple[str, ...] = ("peft",),
    lorafusion: Path | None = None,
    quantize: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every case of `suite`: print a table for each as it is done, return header, rows, failures and refusals."""
    header = new_header(device, repeats, seed, output)
    reasons = {peer: peers.why_not(peer, lorafusion, quantize) for peer in compare}
    refusals: Refusals = [{"peer": peer, "case": "all", "reason": why} for peer, why in reasons.items() if why]
    print_refusals(refusals, output)
    present = tuple(peer for peer in compare if not reasons[peer])
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    result = {"header": header, "rows": rows, "failures": failures, "peers_not_measured": refusals}
    for case in suite.workloads():
        with output.status(f"Timing {case}"):
            case_rows, wrong, refused = measure_case(case, device, repeats, present, lorafusion, quantize, seed)
        rows += case_rows
        refusals += refused
        failures += [{"case": str(case), "reason": reason} for reason in wrong]
        if wrong:
            output.print(f"{case}: no times reported, the correctness gate failed", style="bold red", markup=False)
            output.print("\n".join(f"  {reason}" for reason in wrong), markup=False)
        else:
            print_case(case, case_rows, output)
        print_refusals(refused, output)
        output.save_progress(result)
    output.print(CAPTION)
    return result


def measure_case(
    case: Workload,
    device: torch.device,
    repeats: int,
    compare: tuple[str, ...] = ("peft",),
    lorafusion: Path | None = None,
    quantize: str | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[str], Refusals]:
    """(rows, what the gate found wrong, peers that could not run with the reason): no rows where anything is wrong."""
    problem = BlockProblem.draw(case, device, seed)
    variants, refusals = [], []
    for name in _names(compare, quantize):
        try:
            reason = peers.why_not_here(name, case)
            new = [] if reason else peers.variants(name, problem, lorafusion)
            for variant in new:
                problem.step(variant.module)()
        except Exception as error:  # another project's code: whatever it raises, the others are measured
            if name not in peers.PEERS:
                raise
            new, reason = [], f"{type(error).__name__}: {first_line(error)}"
        variants += new
        if reason:
            refusals.append({"peer": name, "case": str(case), "reason": reason})
    wrong = _gate(variants)
    if wrong:
        return [], wrong, refusals
    refused = [refusal["peer"] for refusal in refusals]
    host = host_times(case, tuple(n for n in _names(compare, quantize) if n not in refused), device, lorafusion)
    return _measure(problem, variants, host, device, repeats), [], refusals


def _names(compare: tuple[str, ...], quantize: str | None) -> list[str]:
    """What is built, in the order of the rows: over 4-bit weights PEFT is bitsandbytes' layer under it."""
    if quantize:
        return ["bare", "ours-nf4", *(["bnb"] if compare else [])]
    return ["bare", "ours", *compare, *(["ours-nf4"] if "bnb" in compare else [])]


def _gate(variants: list[Variant]) -> list[str]:
    """The gate's reasons for each different call of this package's variants.

    Those over the same weights differ in dtypes, not in values: they share the truth, which takes longer than the layer.
    """
    exact: dict[tuple[str, bool], Results] = {}
    reasons = []
    for variant in variants:
        for call, problem in variant.calls().items():
            cases: Any = linear if isinstance(problem, Problem) else members
            key = call, variant.nf4
            exact[key] = exact[key] if key in exact else cases.truth(problem)
            reasons += [f"{variant.name}: {reason}" for reason in cases.wrong(problem, exact[key])]
    return reasons


def _measure(
    problem: BlockProblem, variants: list[Variant], host: dict[str, float], device: torch.device, repeats: int
) -> list[dict[str, Any]]:
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
        row = new_row(case, variant, timings)
        call = step if case.passes == FORWARD else functools.partial(variant.module, *problem.inputs)
        row["host_us"] = 1e6 * host[variant.name] if variant.name in host else None
        row["saved_bytes"] = saved_bytes(call, exclude=kept)
        row["peak_bytes"] = peak_bytes(step, device)
        row["launches"] = kernel_launches(step, device)
        row["cuda_graph"] = graphed[variant.name]
        rows.append(row)
    return rows
