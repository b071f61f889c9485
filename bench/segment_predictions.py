"""What experts, a batch of many adapters and a population should cost on a GPU, by bytes, instructions and operations.

Not measurements, and lower bounds: each kernel takes the longest of its bytes over the copy bandwidth, its instructions (of the
compiled kernels, bf16, sm_90) over the issue rate, and its operations at the vendor's speed, which nobody has measured of them.
They stand over the same layer frozen: products that add to nothing, the gathers and the activation.
"""

from functools import cache
from typing import Any, NamedTuple

from result_files import Rows

from lora_kernels.backends.triton.kernels import segment_nf4_product
from lora_kernels.commands.report import kernels as kernel_report

GPUS = ("H100", "H200")
R, BYTES, TOKENS = 16, 2, 8192
MIXTURES = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "Mixtral-8x7B": (8, 2, 4096, 14336)}  # experts, active, hidden, intermediate
ADAPTERS, BATCHES = 16, ((64, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336))  # M, K, N
POPULATION, POPULATIONS = 256, ((256, 4096, 4096), (4096, 4096, 4096))
PAIRS = 16  # that the gradient's kernel takes at a time
compiled = cache(kernel_report.compiled)


class Work(NamedTuple):
    """Bytes to and from memory, instructions, floating-point operations."""

    moved: float
    issued: float = 0.0
    flops: float = 0.0

    def times(self) -> dict[str, Any]:
        return kernel_report.times(self.moved, self.issued / kernel_report.ISSUE, kernel_report.WARPS, self.flops)


def segment_predictions() -> Rows:
    """Rows as predictions.py has them."""
    found = [row for name, sizes in MIXTURES.items() for row in _experts(name, *sizes)]
    found += [row for sizes in BATCHES for row in _mixed(*sizes)]
    return found + [row for sizes in POPULATIONS for row in _population(*sizes)]


# ---- experts ----


def _experts(name: str, E: int, top_k: int, H: int, inner: int) -> Rows:
    """A layer's experts, forward and backward, each token's rows spread over all of them."""
    M, about = TOKENS * top_k, {"M": TOKENS * top_k, "K": H, "N": inner, "R": R, "p": 0.0}
    parts = {
        "rows to experts and back": [_copies(2 * M, H), _copies(2 * M, H), Work(BYTES * 4 * (M + TOKENS) * H)],
        "products": _products(M, 2 * inner, H, E) + _products(M, H, inner, E),
        "activation": [_kernel("glu", M, inner, 3), _kernel("glu_backward", M, inner, 5)],
        "low-rank terms": _terms(M, 2 * inner, H, E) + _terms(M, H, inner, E),
    }
    rows = [_row(f"{name} experts: {part}", about, works) for part, works in parts.items()]
    layer = _total(f"{name} experts, forward+backward", about, rows)
    frozen = _products(M, 2 * inner, H, E, adds=False) + _products(M, H, inner, E, adds=False)
    _compare(layer, [rows[0], _row("", about, frozen), rows[2]])
    sums = _sums_of(M, 2 * inner, H, E) + _sums_of(M, H, inner, E)
    decoded = _over_4_bits(M, 2 * inner, H, E) + _over_4_bits(M, H, inner, E)
    return [*rows, layer, _row(f"{name} experts: products over 4 bits in the place of these", about, decoded),
            _row(f"{name} experts: what PEFT's W + B·A and its gradient add to the frozen ones", about, sums)]  # fmt: skip


def _copies(rows: int, columns: int) -> Work:
    """Rows gathered into others."""
    return Work(2 * BYTES * rows * columns)


def _products(M: int, N: int, K: int, E: int, adds: bool = True) -> list[Work]:
    """y += x·W_eᵀ and dx += dy·W_e; where they add, their results are read too."""
    passes, W, flops = 1 + adds, E * N * K, 2.0 * M * N * K
    moved = (M * K + passes * M * N + W, M * N + passes * M * K + W)
    return [Work(BYTES * elements, 0, flops) for elements in moved]


def _over_4_bits(M: int, N: int, K: int, E: int) -> list[Work]:
    """The same over codes, which each tile of rows decodes anew; half of each segment's last tile is empty."""
    tile, codes = segment_nf4_product.TILES[BYTES], E * N * K * (1 / 2 + 1 / 64)
    return [
        _kernel("segment_nf4_product", M + E * tile.rows // 2, C, 1, BYTES * 2 * M * D + codes, form, times=D / tile.columns)
        for C, D, form in ((K, N, "forward"), (N, K, ""))
    ]


def _terms(M: int, N: int, K: int, E: int, form: str = "") -> list[Work]:
    """h and y0; g, dx0, dA and dB."""
    kernels = (("segment_shrink", K), ("segment_expand", N), ("segment_shrink", N), ("segment_expand", K),
               ("segment_reduce", K), ("segment_reduce", N))  # fmt: skip
    return [_kernel(kernel, M, width, 1, BYTES * R * (M + E * width), form) for kernel, width in kernels]


def _sums_of(M: int, N: int, K: int, E: int) -> list[Work]:
    """W read and W + s·B·A written in PEFT's forward pass; its gradient made of dy and x, and read for A's and for B's."""
    stack = BYTES * E * N * K
    return [Work(2 * stack, 0, 2.0 * E * N * K * R), Work(stack + BYTES * M * (N + K), 0, 2.0 * M * N * K), Work(2 * stack)]


# ---- several adapters in a batch, populations ----


def _mixed(M: int, K: int, N: int) -> Rows:
    """multi_lora_linear of M rows in turn of each adapter: forward where there are few, else backward too."""
    about, few, stacks = {"M": M, "K": K, "N": N, "R": R, "p": 0.0}, M <= 64, BYTES * 2 * ADAPTERS * R * (K + N)
    terms = _terms(M, N, K, ADAPTERS, "order")[: 2 if few else 6]
    low_rank = [*terms, *[Work(stacks)] * (1 if few else 2)]  # A and B packed into stacks in each direction
    products, frozen = (_products(M, N, K, 1, adds)[: 1 if few else 2] for adds in (True, False))
    parts = {"base product": products, "low-rank terms": low_rank}
    rows = [_row(f"{ADAPTERS} adapters: {part}", about, works) for part, works in parts.items()]
    layer = _total(f"{ADAPTERS} adapters in a batch, forward" + "+backward" * (not few), about, rows)
    return [*rows, _compare(layer, [_row("", about, frozen)])]


def _population(M: int, K: int, N: int) -> Rows:
    """eggroll_linear of one row or several of each member, rank 1, beside its frozen product; and the gradient's estimate."""
    about, chunks = {"M": M, "K": K, "N": N, "R": 1, "p": 0.0}, -(-POPULATION // 2 // PAIRS)
    tiles = max(1, 32 * POPULATION // 2 / M)  # a pair's rows fill a tile of 32, or leave a part of it empty
    terms = [_kernel("eggroll_project", M, K, 1, 4 * M, times=tiles), _kernel("eggroll_add", M, N, 1, 4 * M, times=tiles)]
    rows = [_row(f"population of {POPULATION}: base product", about, _products(M, N, K, 1)[:1]),
            _row(f"population of {POPULATION}: low-rank terms", about, terms)]  # fmt: skip
    layer = _total(f"population of {POPULATION}, forward", about, rows)
    _compare(layer, [_row("", about, _products(M, N, K, 1, adds=False)[:1])])
    separate = [Work(BYTES * POPULATION * N * K * 3 + BYTES * M * (N + K), 0, 2.0 * M * N * K)]  # made, and read again
    gradient = [_kernel("eggroll_gradient", N, K, 2, times=chunks)]
    return [*rows, layer, _row(f"population of {POPULATION}: weights of its members, made and multiplied", about, separate),
            _row(f"population of {POPULATION}: estimate of the gradient", about, gradient)]  # fmt: skip


# ---- rows ----


def _kernel(kernel: str, rows: int, columns: int, passes: int, beside: float = 0.0, form: str = "", times: float = 1) -> Work:
    """A kernel that passes so many times over a matrix of rows·columns, of which its main loop takes each element `times`."""
    wanted = {"glu": {"alone", "halves"}, "glu_backward": {"alone", "halves"}}.get(kernel, {*form.split()})
    counts = next(
        counts for (name, types, rank, gpu, own), counts in compiled().items()
        if (name, types, rank, gpu) == (kernel, "bf16 bf16", "r16", "sm_90") and _same(kernel, {*own.split()[2:]}, wanted)
    )  # fmt: skip
    return Work(BYTES * passes * rows * columns + beside, times * rows * columns * counts["per_element"])


def _same(kernel: str, form: set[str], wanted: set[str]) -> bool:
    """Without dropout; of the reduction, which is compiled with it, the form that has the same loop."""
    return form - {"drop", "dc"} == wanted and (kernel == "segment_reduce" or "drop" not in form)


def _row(name: str, about: dict[str, Any], works: list[Work]) -> dict[str, Any]:
    """One part: the sum of its kernels; bound as the longest of them is."""
    of = [work.times() for work in works]
    us = {gpu: sum(times[f"{gpu.lower()}_us_predicted"] for times in of) for gpu in GPUS}
    bound = max(of, key=lambda times: times["h100_us_predicted"])["bound"]
    return {"kernel": name, **about, "megabytes": sum(work.moved for work in works) / 1e6, "us": us, "bound": bound}


def _total(name: str, about: dict[str, Any], rows: Rows) -> dict[str, Any]:
    us = {gpu: sum(row["us"][gpu] for row in rows) for gpu in GPUS}
    return {"kernel": name, **about, "megabytes": sum(row["megabytes"] for row in rows), "bound": "", "us": us}


def _compare(layer: dict[str, Any], frozen: Rows) -> dict[str, Any]:
    """The layer with its times over those of the rows of the frozen one."""
    layer["times_bare"] = {gpu: layer["us"][gpu] / sum(row["us"][gpu] for row in frozen) for gpu in GPUS}
    return layer
