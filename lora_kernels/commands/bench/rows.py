"""One row of the benchmark of layers, as data and as a line of the table."""

from typing import Any

from ...cases import glu_mlp
from ...cases.linear import Problem
from ...cases.members import MembersProblem
from ...dtypes import dtype_name
from ...plan import Call, describe, report, use_backend
from ..console import Output, format_bytes
from ..timing import Timing
from .peers import BARE, HEADINGS, Variant
from .suites import Workload

LESS_IMPORTANT = ("launches", "GB/s", "backend", "p20–p80", "TFLOP/s", "peak", "saved", *reversed(HEADINGS.values()))


def new_row(case: Workload, variant: Variant, timings: dict[str, Timing]) -> dict[str, Any]:
    """What JSON holds of one variant of a case: how it was measured, its time, and the rates that follow."""
    timing = timings[variant.name]
    shape = case.shape
    return {
        "case": str(case),
        "op": case.passes,
        "block": shape.block,
        **{"M": case.M, "K": shape.K, "N": shape.N, "kv": shape.kv or None, "R": case.R, "p": case.p},
        "dtype": dtype_name(case.dtype),
        "dora": case.dora,
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
    """The backends that compute `variant`; None for what is not this package's."""
    used = {row.backend: None for problem in variant.calls().values() for row in report(_call(problem)) if row.used}
    return ", ".join(used) or None


def _call(problem: Problem | MembersProblem) -> Call:
    members = (problem.member(),) if isinstance(problem, Problem) else tuple(problem.members.values())
    mlp = isinstance(problem.case, glu_mlp.Case)
    options, x = (problem.case.activation,) if mlp else (), problem.x  # type: ignore[union-attr]
    return describe("glu_mlp" if mlp else "linear", use_backend.current, x.dtype, x, members, problem.dropout(), options)


def launches(row: dict[str, Any]) -> list[int]:
    """Kernels of a call, where they are counted: on a GPU."""
    return [] if row["launches"] is None else [row["launches"]]


def as_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[str, ...]]]:
    """(columns, cells) of a case's rows."""
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
            "" if row["host_us"] is None else f"{row['host_us']:,.0f}",
            *map(str, launches(row)),
        )
        for row in rows
    ]
    columns += ["saved", "peak", "host µs", *(["launches"] if launches(rows[0]) else [])]
    return columns, cells


def print_case(case: Workload, rows: list[dict[str, Any]], output: Output) -> None:
    """The case's table."""
    output.table(f"{case.passes}, {case}", *as_table(rows), less_important=LESS_IMPORTANT)
