"""What the Triton kernels should reach by bytes and instructions, beside what a GPU measured: bench/results/README.md.

Not measurements: report/kernels.py says what bounds each kernel. A layer is its four side kernels (the prefill dataflow), the
two products at the vendor's speed, and what these take longer because they add to what lies there.
"""

from typing import Any

from result_files import Rows, devices, kind, load, runs, table
from segment_predictions import segment_predictions

from lora_kernels.commands.bench.peers import OURS
from lora_kernels.commands.report import kernels as kernel_report

PREDICTED = ((8192, 4096, 4096), (8192, 4096, 14336))  # M, K, N
GPUS = ("H100", "H200")
SIDE_KERNELS = kernel_report.SIDE_KERNELS
READ = 0.3  # of the time to read y0 or dx0 that a product does not hide: 0.29 to 0.37 on an H200 (bench/addmm_beta.py)
DECODER = (  # Llama-3.1-8B: kernel, K, N, members of a launch; q, k, v, then o, then gate, up and down
    *[("project", 4096, 4096, 3), ("prefill", 4096, 4096, 1), ("prefill", 4096, 1024, 1), ("prefill", 4096, 1024, 1)],
    *[("grad_dy", 4096, 4096, 1), ("grad_dy", 4096, 1024, 1), ("grad_dy", 4096, 1024, 1), ("grad_x", 4096, 4096, 3)],
    *[("project", 4096, 4096, 1), ("prefill", 4096, 4096, 1), ("grad_dy", 4096, 4096, 1), ("grad_x", 4096, 4096, 1)],
    *[("project", 4096, 14336, 2), ("prefill", 4096, 14336, 1), ("prefill", 4096, 14336, 1), ("glu", 4096, 14336, 2)],
    *[("prefill", 14336, 4096, 1), ("grad_dy", 14336, 4096, 1), ("glu_backward", 4096, 14336, 2), ("grad_x", 4096, 14336, 2)],
)
WEIGHTS = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
ACTIVATION = 14 * 14336  # values a token that a frozen layer's silu and product read and write: 5 forward, 9 backward
BLOCKS = "decoder layer's linears and activation, forward+backward"
MAGNITUDES = tuple((M, 4096, 4096) for M in (512, 2048, 8192))
DORA = "layer with a magnitude, forward+backward"
OVER = {"times_bare": "bare", "times_lora": "without"}
LAYER, READS = "layer, forward+backward", "products' reads of y0 and dx0"


def predictions() -> Rows:
    """Per side kernel and for the whole layer: bytes, and microseconds on an H100 and H200 with the prefill dataflow."""
    found = [row for shape in PREDICTED for p in (0.0, 0.1) for row in _layer(*shape, p)]
    found += [row for p in (0.0, 0.1) for row in _decoder(8192, p)]
    return found + [row for shape in MAGNITUDES for row in _with_magnitude(*shape)] + segment_predictions()


def _layer(M: int, K: int, N: int, p: float) -> Rows:
    """The four side kernels, what the products' reads add, and the layer over its bare products."""
    found, about = [], {"M": M, "K": K, "N": N, "R": 16, "p": p}
    for row in _layer_kernels(M, K, N, dropped=p > 0):
        us = {"H100": row.h100_us_predicted, "H200": row.h200_us_predicted}
        found.append({"kernel": row.kernel, **about, "megabytes": row.megabytes, "us": us, "bound": row.bound})
    added = 2 * M * (N + K)
    read = {gpu: 1e6 * READ * added / bandwidth for gpu, bandwidth in kernel_report.BANDWIDTH.items()}
    found.append({"kernel": READS, **about, "megabytes": added / 1e6, "us": read, "bound": "bytes"})
    base = 2e6 * 2 * M * K * N / kernel_report.MATRIX
    layer = {gpu: base + sum(row["us"][gpu] for row in found) for gpu in GPUS}
    over = {gpu: us / base for gpu, us in layer.items()}
    return [*found, {"kernel": LAYER, **about, "megabytes": None, "bound": "", "us": layer, "times_bare": over}]


def _with_magnitude(M: int, K: int, N: int) -> Rows:
    """What DoRA adds to a layer: the norms of the rows of W + s·B·A, a pass over v forward, one over dy and v backward."""
    found, about = [], {"M": M, "K": K, "N": N, "R": 16, "p": 0.0}
    rows = kernel_report.kernel_rows(M, K, N, "sm_90", "bf16 bf16")
    for row in [_usual(rows, kernel, 1, dropped=False) for kernel in kernel_report.MAGNITUDE_KERNELS]:
        us = {"H100": row.h100_us_predicted, "H200": row.h200_us_predicted}
        found.append({"kernel": row.kernel, **about, "megabytes": row.megabytes, "us": us, "bound": row.bound})
    lora = _layer(M, K, N, 0.0)[-1]["us"]
    layer = {gpu: lora[gpu] + sum(row["us"][gpu] for row in found) for gpu in GPUS}
    added = {"megabytes": sum(row["megabytes"] for row in found), "bound": ""}
    over = {gpu: us / lora[gpu] for gpu, us in layer.items()}
    return [*found, {"kernel": DORA, **about, **added, "us": layer, "times_lora": over}]


def _decoder(M: int, p: float) -> Rows:
    """The blocks of a decoder layer, q, k, v as one and the gated MLP as one, over the same layer frozen, run by PyTorch."""
    found: Rows = []
    for kernel, K, N, members in DECODER:
        row = _usual(kernel_report.kernel_rows(M, K, N, "sm_90", "bf16 bf16"), kernel, members, p > 0)
        added = 2 * M * {"prefill": N, "grad_x": K}.get(kernel, 0)
        times = {"H100": row.h100_us_predicted, "H200": row.h200_us_predicted}
        us = {gpu: times[gpu] + 1e6 * READ * added / kernel_report.BANDWIDTH[gpu] for gpu in GPUS}
        name = f"{kernel} of {members}" if members > 1 and kernel in ("project", "grad_x") else kernel
        found.append({"kernel": f"decoder: {name}", "M": M, "K": K, "N": N, "R": 16, "p": p, "megabytes": row.megabytes,
                      "us": us, "bound": row.bound})  # fmt: skip
    products = 2e6 * 2 * M * WEIGHTS / kernel_report.MATRIX
    frozen = {gpu: products + 1e6 * 2 * M * ACTIVATION / kernel_report.BANDWIDTH[gpu] for gpu in GPUS}
    total = {gpu: products + sum(row["us"][gpu] for row in found) for gpu in GPUS}
    over = {gpu: us / frozen[gpu] for gpu, us in total.items()}
    found.append({"kernel": BLOCKS, "M": M, "K": 4096, "N": 14336, "R": 16, "p": p, "megabytes": None, "bound": "",
                  "us": total, "times_bare": over})  # fmt: skip
    return found


def _usual(rows: list[kernel_report.KernelRow], kernel: str, members: int, dropped: bool) -> kernel_report.KernelRow:
    """The row of a kernel with the table's own tile, in the form that most calls take, at rank 16."""
    dropped = dropped and kernel not in ("prefill", "grad_dy")
    rare = {"dc", "dA", "dx", "few", "ungated", "gelu", "gelu_tanh", "relu2", "nf4", "alone"}
    for row in rows:
        form = set(row.form.split())
        usual = row.kernel == kernel and row.rank == "r16" and not rare & form and ("drop" in form) == dropped
        if usual and kernel_report.members_of(kernel, row.form) == members:
            return row
    raise LookupError(f"kernels.json has no {kernel} of {members} members for sm_90; run tests/triton_offline.py")


def _layer_kernels(M: int, K: int, N: int, dropped: bool) -> list[kernel_report.KernelRow]:
    """The four side kernels of a layer with the table's own tile, in the form that most calls take: those of rank 16."""
    rows = kernel_report.kernel_rows(M, K, N, "sm_90", "bf16 bf16")
    return [_usual(rows, kernel, 1, dropped) for kernel in SIDE_KERNELS]


def measured() -> dict[tuple[Any, ...], dict[str, float]]:
    """(kernel, M, K, N, R, p) -> µs by GPU, with bf16 adapters, from the "kernels" and "bench" stages of every device."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for folder in devices():
        for gpu in (gpu for gpu in GPUS if gpu.lower() in folder.name):
            for _, run in (run for data in load(folder).values() for run in runs(data)):
                for row in run["rows"]:
                    case = tuple(row.get(key) for key in ("M", "K", "N", "R", "p"))
                    if kind(run) == "kernels" and row["adapter"] == "bfloat16":
                        found.setdefault((row["variant"], *case), {})[gpu] = 1e6 * row["timing"]["median"]
                    elif kind(run) == "layer" and _plain_layer(row):
                        found.setdefault((LAYER, *case), {})[gpu] = row["median_us"]
    return found


def _plain_layer(row: dict[str, Any]) -> bool:
    """Ours, forward and backward, of one linear layer without a magnitude."""
    alone = row.get("block", "linear") == "linear" and not row.get("dora")
    return alone and (row["variant"], row["op"]) == (OURS, "forward+backward")


def page() -> str:
    """bench/results/README.md: the predictions with their measurements beside them."""
    known, rows = measured(), []
    for row in predictions():
        found = known.get(tuple(row[key] for key in ("kernel", "M", "K", "N", "R", "p")), {})
        name = f"{row['kernel']} {row['K']}→{row['N']} M={row['M']} r={row['R']} p={row['p']:g}"
        cells = [name, "" if row["megabytes"] is None else f"{row['megabytes']:.0f}", row["bound"]]
        for gpu in GPUS:
            over = "".join(f" ({row[key][gpu]:.3f}× {name})" for key, name in OVER.items() if key in row)
            cells += [f"{row['us'][gpu]:.1f}{over}", f"{found[gpu]:.1f}" if gpu in found else ""]
        rows.append(cells)
    columns = ["kernel", "MB moved", "bound on H100", "H100 µs, predicted", "measured", "H200 µs, predicted", "measured"]
    links = "".join(f"- [{folder.name}]({folder.name}/README.md)\n" for folder in devices())
    return (
        f"# Results\n\nMade by `bench/report.py`.\n\n{links}\n## Predictions\n\n"
        "Not measurements: the longest of bytes over the copy bandwidth (3.0 and 4.3 TB/s), sums of partial results included, "
        "instructions over the issue rate, and over the part of it that fewer than sixteen warps on a processor reach "
        "(occupancy), from the compiled kernels (bf16, sm_90); a layer is its four side kernels, two products at 790 TFLOP/s, "
        "and three tenths of the time to read y0 and dx0, to which they add. "
        "The blocks of a decoder layer (Llama-3.1-8B; q, k, v as one operation, gate, up and down with the activation as "
        "another) stand over the same layer frozen, its activation by PyTorch's kernels. "
        "A layer with a magnitude (DoRA) stands over the same layer without; its megabytes are those that the magnitude adds. "
        "Experts (8192 tokens, spread over all of them), a batch of 16 adapters and a population of 256 stand over the same "
        "layer frozen, their products at the vendor's speed too: lower bounds, as no kernel of theirs has been timed. "
        "[predictions.json](predictions.json). A measured column fills when a device has a result file.\n\n"
        + table(columns, rows)
    )
