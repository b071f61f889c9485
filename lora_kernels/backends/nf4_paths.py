"""Which kernel computes y with a 4-bit base weight: one frozen table, read from the top; `print(nf4_paths.table())` shows it.

    skinny   each weight is decoded once into tensor core fragments (csrc/nf4_skinny.cu)         1 to 16 tokens
    loop     weights are decoded inside the product's loop (triton/kernels/nf4_product.py)        17 to 256 tokens
    scratch  W is dequantised into fresh memory, which the vendor's product reads and frees      everything else

The backward pass always takes scratch: one dequantised W serves dx, and a long contraction over tokens wants speed.
"""

from collections.abc import Callable
from dataclasses import dataclass

MANY = 1 << 62


@dataclass(frozen=True)
class Row:
    """first <= M <= last tokens take `path` on GPUs of `capability` (None: on all), because of `evidence`."""

    path: str
    first: int
    last: int
    capability: tuple[int, int] | None
    evidence: str


TABLE = (
    Row(
        "skinny",
        1,
        16,
        None,
        "counted: 0.56 bytes per weight instead of 4.56; 4.0 instructions, 5.4 fit under the bytes (H100)",
    ),
    Row(
        "loop",
        17,
        256,
        None,
        "counted, H100, 64 tokens: 4096→14336 66 µs, by way of scratch 91; 14336→4096 98 and 110; 4096→4096 32 and 31",
    ),
    Row("scratch", 1, MANY, None, "counted: dequantising is 1-4 % of a product with 8192 tokens"),
)


def path(M: int, capability: tuple[int, int], refusal: Callable[[str], str | None]) -> tuple[str, str]:
    """(path, why): the first row for M tokens on this GPU whose kernel does not refuse; refusal(path) is a reason or None."""
    refused: list[str] = []
    for row in TABLE:
        if not row.first <= M <= row.last or row.capability not in (None, capability):
            continue
        reason = refusal(row.path)
        if reason is None:
            return row.path, "; ".join([*refused, row.evidence])
        refused.append(f"not {row.path}: {reason}")
    raise AssertionError("the last row takes everything")


def cells() -> list[tuple[str, str, str, str]]:
    """The table's rows as text: path, tokens, GPU, evidence."""
    rows = []
    for row in TABLE:
        tokens = f"{row.first}-{row.last}" if row.last < MANY else f"{row.first}-"
        rows.append((row.path, tokens, "any" if row.capability is None else "sm_{}{}".format(*row.capability), row.evidence))
    return rows


def table() -> str:
    """The table in lines of text."""
    return "\n".join("{:10}{:>10}  {:8}{}".format(*row) for row in [("path", "tokens", "GPU", "evidence"), *cells()])
