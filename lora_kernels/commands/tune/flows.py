"""Dataflows, prefill and the vendor's product or both in one kernel: their times, and the choice."""

from typing import Any

import torch

from ..timing import interleaved
from . import calls

FUSE = 0.99  # one kernel must take at most this part of prefill's time, at every dtype class
Seconds = dict[str, float]


def time_flows(
    direction: str, contraction: int, M: int, best: dict[tuple[str, str, int], Any], sizes: calls.Sizes, device: torch.device
) -> dict[str, Seconds]:
    """dtype class -> dataflow -> median seconds of what differs between the two, with the tiles chosen before."""
    from ...backends.triton.tuning import trial

    times = {}
    for arithmetic in calls.DTYPES:
        K, N = (contraction, sizes.width) if direction == "forward" else (sizes.width, contraction)
        problem = calls.draw(M, K, N, calls.RANK[32], arithmetic, device)
        trial.update({kernel: tile for (kernel, kind, rank), tile in best.items() if (kind, rank) == (arithmetic, 32)})
        try:
            timings = interleaved(dict(calls.flow_calls(direction, problem)), sizes.repeats, warmup=3, device=device)
        finally:
            trial.clear()
        times[arithmetic] = {name: timing.median for name, timing in timings.items()}
    return times


def choose_flow(direction: str, contraction: str, tokens: str, times: dict[str, Seconds]) -> dict[str, Any]:
    """One kernel where it is ahead of prefill by more than noise at every dtype class."""
    wins = all(seconds["lowrank_product"] <= FUSE * seconds["prefill"] for seconds in times.values())
    return {
        "direction": direction,
        "contraction": contraction,
        "tokens": tokens,
        "choice": "lowrank_product" if wins else "prefill",
        **{f"{flow}_us": {kind: 1e6 * t[flow] for kind, t in times.items()} for flow in ("prefill", "lowrank_product")},
    }
