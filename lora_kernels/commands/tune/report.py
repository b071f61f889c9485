"""The choices of tuning as tables, with the numbers behind them."""

from typing import Any

from ..console import Output
from .flows import Seconds
from .tiles import label


def print_choices(result: dict[str, Any], output: Output) -> None:
    """The choices and the numbers behind them."""
    rows = [
        (
            row["direction"],
            row["contraction"],
            row["tokens"],
            *_pairs(row),
            row["choice"],
        )
        for row in result["dataflow"]
    ]
    kinds = [f"{kind}: prefill / one kernel µs" for kind in (result["dataflow"][0]["prefill_us"] if rows else ())]
    output.table("Dataflow", ("direction", "contraction", "tokens", *kinds, "choice"), rows)
    tiles = [
        (row["kernel"], row["arithmetic"], row["rank"], f"{row['us']:,.1f}", f"{max(row['measured_us'].values()):,.1f}",
         len(row["measured_us"]), label(row["tile"]))
        for row in result["tiles"]
    ]  # fmt: skip
    output.table("Tiles", ("kernel", "dtypes", "rank to", "µs", "slowest µs", "tried", "choice"), tiles)


def _pairs(row: dict[str, Seconds]) -> list[str]:
    return [f"{us:,.1f} / {row['lowrank_product_us'][kind]:,.1f}" for kind, us in row["prefill_us"].items()]
