"""What is known of the Triton kernels without a GPU: machine code counted, bytes counted, times predicted.

Registers, spills, shared memory and instructions come from offline compilation (backends/triton/kernels.json, written by
tests/triton_offline.py). Times are predictions, not measurements: the larger of bytes over the device's copy bandwidth, sums
of partial results included, and instructions over its issue rate, for the part of it that the warps on a processor reach.
Only the dataflows need Triton to be read.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...backends import nf4_paths
from ..console import CommandError, Output

TABLE = Path(__file__).parents[2] / "backends/triton/kernels.json"
PROCESSORS = 132
ISSUE = PROCESSORS * 128 * 1.7e9  # instructions per second: processors × lanes × clock, H100 and H200
WARPS = 16  # on a processor, four for each scheduler, that issue without gaps; fewer issue that part of it
SIDE_KERNELS = ("project", "prefill", "grad_dy", "grad_x")  # of a layer; the first and the last of groups too
BLOCK_KERNELS = ("glu", "glu_backward")  # of an MLP, whose intermediate features are N
MAGNITUDE_KERNELS = ("row_norm", "magnitude", "magnitude_backward")  # of a layer with a magnitude, beside the first
LESS_IMPORTANT = ("matrix", "shared", "per element", "spills", "megabytes", "registers", "ctas per sm", "h200 us predicted")
MATRIX = 790e12  # bf16 multiply-adds ·2 per second that the vendor's product reaches on them
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes per second of a device copy


@dataclass(frozen=True)
class KernelRow:
    """One kernel of a layer: its compiled form for one GPU family and what one call moves, with predicted microseconds."""

    kernel: str
    rank: str
    form: str
    registers: int
    spills: int
    shared: int
    ctas_per_sm: int
    matrix: str
    per_element: float | None
    megabytes: float
    h100_us_predicted: float
    h200_us_predicted: float
    bound: str  # on an H100: bytes, issue (instructions), occupancy (too few warps to issue them) or flops


def compiled() -> dict[tuple[str, ...], dict]:
    """The table of compiled kernels: (kernel, dtypes, rank, target, form) -> counts."""
    return {tuple(key.split(" | ")): counts for key, counts in json.loads(TABLE.read_text()).items()}


def kernel_rows(
    M: int = 8192,
    K: int = 4096,
    N: int = 4096,
    target: str = "sm_90",
    dtypes: str = "bf16 bf16",
) -> list[KernelRow]:
    """A row per kernel compiled for `target` with these dtypes: what it moves for x[M, K] and W[N, K], and for how long."""
    rows = []
    for (kernel, types, rank, gpu, form), counts in compiled().items():
        if gpu != target or types != dtypes:
            continue
        data, adapter = (4 if name == "fp32" else 2 for name in dtypes.split()[:2])
        R = int(rank[1:])
        n = members_of(kernel, form)
        elements, moved, flops = _work(kernel, M, K, N, R, data, adapter, n)
        if "alone" in form.split():
            moved -= adapter * M * R * (n + 1 if kernel == "glu_backward" else 1)
        if "nf4" in form.split():
            moved += (N * K // 2 + N * K // 64) - data * N * K
        issued, warps = 0.0, WARPS
        if kernel in SIDE_KERNELS + BLOCK_KERNELS + MAGNITUDE_KERNELS:
            programs, partials = _cut(kernel, M, K, N, R, n, *[int(size) for size in form.split()[0].split("x")])
            moved += 0 if "alone" in form.split() else partials
            warps = int(re.findall(r"w(\d+)s", form)[0]) * min(counts["ctas_per_sm"], -(-programs // PROCESSORS))
            issued = elements * counts["per_element"] / ISSUE
        fields = {name: counts[name] for name in ("registers", "spills", "shared", "ctas_per_sm", "matrix", "per_element")}
        of = times(moved, issued, warps, flops)
        rows.append(KernelRow(kernel, rank, form, **fields, megabytes=moved / 1e6, **of))
    return rows


def members_of(kernel: str, form: str) -> int:
    """How many members a launch serves: those of a group, "x3"; of an MLP's passes gate and up, or up alone."""
    if kernel in BLOCK_KERNELS:
        return 1 if "ungated" in form else 2
    found = re.search(r" x(\d)", form)
    return int(found[1]) if found else 1


def times(moved: float, issued: float, warps: int, flops: float) -> dict[str, Any]:
    """The predicted microseconds, and what bounds them."""
    bounds = {"issue": issued, "occupancy": issued / min(1, warps / WARPS), "flops": flops / MATRIX}
    h100, h200 = ({"bytes": moved / bandwidth, **bounds} for bandwidth in BANDWIDTH.values())
    bound = max(h100, key=h100.__getitem__)  # issue, where occupancy costs nothing more
    us = {f"{name}_us_predicted": 1e6 * max(of.values()) for name, of in (("h100", h100), ("h200", h200))}
    return {**us, "bound": bound}


def _cut(kernel: str, M: int, K: int, N: int, R: int, n: int, rows: int, columns: int) -> tuple[int, int]:
    """(programs of a launch, bytes of all partial results written and read again) of n members with this tile."""
    width = K if kernel in ("project", "grad_x") else N
    if kernel == "row_norm":
        programs = -(-N // rows)
        count = parts(K, max(256, columns), programs)
        return programs * count, 8 * count * N if count > 1 else 0
    strips = -(-width // columns)
    if kernel in ("prefill", "magnitude"):
        return -(-M // rows) * strips, 0
    if kernel in ("project", "glu"):
        programs = -(-M // rows)
        count = parts(width, max(256, columns), programs)
        return programs * count, 8 * count * M * R * (n if kernel == "project" else 1) if count > 1 else 0
    if kernel == "magnitude_backward":
        count = parts(M, rows, strips)
        return strips * count, 8 * count * N if count > 1 else 0
    count = parts(M, rows, strips)
    of_g = 8 * n * strips * M * R if kernel in ("grad_dy", "glu_backward") and strips > 1 else 0
    sums = n + 1 if kernel == "glu_backward" else n  # down's dA too
    of_rest = 8 * count * sums * R * width if count > 1 else 0
    return strips * count, of_g + of_rest


def parts(width: int, tile: int, programs: int) -> int:
    """How many parts a reduction is cut into: tuning.splits, which needs Triton to be imported, for these GPUs."""
    tiles = -(-width // tile)
    return -(-tiles // -(-tiles // max(1, min(tiles, 2 * PROCESSORS // programs))))


def _work(kernel: str, M: int, K: int, N: int, R: int, data: int, adapter: int, n: int) -> tuple[int, int, int]:
    """Elements that pass through the main loop, bytes moved from and to memory, and floating-point operations, of n members."""
    x, dy, W, narrow = data * M * K, data * M * N, data * N * K, adapter * M * R
    return {
        "project": (M * K, x + n * narrow, 0),
        "prefill": (M * N, dy + narrow, 0),
        "grad_dy": (M * N, dy + 2 * narrow, 0),
        "grad_x": (M * K, 2 * x + n * narrow, 0),
        "glu": (M * N, (n + 1) * dy + narrow, 0),
        "glu_backward": (M * N, (2 * n + 1) * dy + (n + 1) * narrow, 0),
        "row_norm": (N * K, W + adapter * R * (N + K) + 4 * N, 0),
        "magnitude": (M * N, 2 * dy, 0),
        "magnitude_backward": (M * N, 3 * dy, 0),
        "eggroll_project": (M * K, x + 4 * M, 0),
        "eggroll_add": (M * N, dy + 4 * M, 0),
        "eggroll_gradient": (N * K, 4 * N * K, 0),
        "segment_shrink": (M * K, x + narrow, 0),
        "segment_expand": (M * N, dy + narrow, 0),
        "segment_reduce": (M * K, x + narrow, 0),
        "segment_product": (M * K, x + 2 * dy + W, 2 * M * N * K),
        "segment_nf4_product": (M * K, x + 2 * dy + N * K // 2, 2 * M * N * K),
        "lowrank_product": (M * K, x + dy + W + narrow, 2 * M * N * K),
        "lowrank_product_tma": (M * K, x + dy + W + narrow, 2 * M * N * K),
        "nf4_product": (M * K, x + dy + N * K // 2 + narrow, 2 * M * N * K),
        "nf4_dequantize": (N * K, N * K // 2 + W, 0),
        "drop": (M * K, 2 * x, 0),
        "sum": (0, 2 * narrow, 0),
    }[kernel]


def choices(target: str) -> list[tuple[str, ...]]:
    """(direction, contraction, tokens, dataflow, evidence) of a call on `target`; empty where Triton is not installed.

    The evidence is this machine's GPU's, or that of the devices of `target` whose measurements are in the package.
    """
    from ...plan import load

    if isinstance(load("triton", "linear"), str):
        return []
    from ...backends.triton import tuned

    rows: list[tuple[str, ...]] = []
    for device, found in _measured(target).items():
        for key, row in found.dataflow.items():
            times = (f"{name} {row[f'{name}_us']}" for name in tuned.DATAFLOWS)
            rows.append((*key, row["choice"], f"{device}: {', '.join(times)} µs, {found.source}"))
    return rows or [("both", "any", "any", "prefill", "not measured: `lora-kernels tune` does it on the GPU itself")]


def measured_tiles(target: str) -> list[tuple[str, ...]]:
    """(kernel, dtypes, rank class, tile, evidence) that differ from the table's because a measurement says so."""
    from ...plan import load

    if isinstance(load("triton", "linear"), str):
        return []
    return [
        (*map(str, key), str(row["tile"]), f"{device}: {row['us']:.1f} µs, {len(row['measured_us'])} tried, {found.source}")
        for device, found in _measured(target).items()
        for key, row in found.tiles.items()
    ]


def _measured(target: str) -> dict[str, Any]:
    """device -> its measurements, for the GPUs here and the package's own files, of compute capability `target`."""
    import torch

    from ...backends.triton import tuned

    capability = divmod(int(target.removeprefix("sm_")), 10)
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
             if torch.cuda.get_device_capability(i) == capability}  # fmt: skip
    for path in sorted(tuned.COMMITTED.glob("*.json")):
        data = json.loads(path.read_text())
        names |= {data["device"]} if tuple(data["capability"]) == capability else set()
    return {name: tuned.read(name, capability) for name in sorted(names)}


def run(M: int, K: int, N: int, target: str, dtypes: str, out: Output) -> dict[str, Any]:
    """Print the kernels compiled for `target` and the dataflow that is chosen there; the same as data for JSON."""
    known = {(key[3], key[1]) for key in compiled()}
    targets, pairs = sorted({t for t, _ in known}), sorted({d for t, d in known if t == target})
    if target not in targets:
        raise CommandError(f"--target: got {target!r}, expected one of {', '.join(targets)}")
    if dtypes not in pairs:
        raise CommandError(f"--dtypes: got {dtypes!r}, expected for {target} one of {', '.join(pairs)}")
    rows = kernel_rows(M, K, N, target, dtypes)
    title = f"Triton kernels for {target}, {dtypes}: machine code, and one call with x[{M}, {K}], W[{N}, {K}]"
    cells = [[_cell(value) for value in asdict(row).values()] for row in rows]
    columns = [name.replace("_", " ") for name in KernelRow.__dataclass_fields__]
    caption = "Compiled, not run: µs are predictions from bytes, instructions and warps."
    out.table(title, columns, cells, caption, LESS_IMPORTANT)
    chosen = choices(target)
    if chosen:
        out.table(f"Dataflow on {target}", ("direction", "contraction", "tokens", "dataflow", "reason"), chosen)
    if tiles := measured_tiles(target):
        out.table(f"Measured tiles on {target}", ("kernel", "dtypes", "rank to", "tile", "reason"), tiles)
    out.table("Products with a 4-bit weight", ("path", "tokens", "GPU", "evidence"), nf4_paths.cells())
    return {"kernels": [asdict(row) for row in rows], "dataflow": chosen, "tiles": tiles}


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "" if value is None else str(value)
