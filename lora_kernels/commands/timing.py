"""Time of a callable: medians of interleaved runs, and calls as CUDA graphs.

The command line, the benchmark and the tests all time with these functions, so that their numbers mean the same.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .console import first_line

MIN_FLUSH_BYTES = 256 << 20  # more than the L2 of every current GPU; doubled from the device's own figure where larger


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: median, 20th and 80th percentile of `repeats` runs."""

    median: float
    p20: float
    p80: float
    repeats: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def interleaved(
    fns: dict[str, Callable[[], Any]], repeats: int = 20, warmup: int = 3, device: torch.device | str = "cpu"
) -> dict[str, Timing]:
    """Time every variant once per round, for `repeats` rounds after `warmup` unmeasured ones: variant -> Timing.

    Rounds start with a different variant each, so that drift of clocks and neighbours on the machine meet all variants
    alike. CUDA: events around each call, with the L2 cache overwritten before it; that write also hides the launch cost
    of calls that launch faster than it runs. CPU: perf_counter.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats, warmup: got {repeats}, {warmup}, expected repeats >= 1 and warmup >= 0")
    device = torch.device(device)
    measure = _cuda_round(device) if device.type == "cuda" else _cpu_round
    names = list(fns)
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for round_index in range(warmup + repeats):
        first = round_index % max(1, len(names))
        order = names[first:] + names[:first]
        seconds = measure([fns[name] for name in order])
        if round_index >= warmup:
            for name, value in zip(order, seconds, strict=True):
                samples[name].append(value)
    return {name: summarize(values) for name, values in samples.items()}


def least(
    fns: dict[str, Callable[[], Any]], device: torch.device | str = "cpu", windows: int = 200, calls: int = 4
) -> dict[str, float]:
    """Seconds of a call of each variant on the host: the least mean of many short windows of `calls` calls, in turn.

    The least, because a busy machine leaves some windows alone. CUDA: each window begins with an idle device, and ends when its
    last call has returned, whatever is left to do there.
    """
    device = torch.device(device)
    found = dict.fromkeys(fns, float("inf"))
    for _ in range(windows):
        for name, fn in fns.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                fn()
            found[name] = min(found[name], (time.perf_counter() - start) / calls)
    return found


def summarize(seconds: list[float]) -> Timing:
    """Median and 20th/80th percentile, interpolated, of the samples."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[3], len(seconds))


def _cpu_round(fns: list[Callable[[], Any]]) -> list[float]:
    seconds = []
    for fn in fns:
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return seconds


def _cuda_round(device: torch.device) -> Callable[[list[Callable[[], Any]]], list[float]]:
    cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    flush = torch.empty(max(MIN_FLUSH_BYTES, 2 * cache_bytes), dtype=torch.int8, device=device)

    def measure(fns: list[Callable[[], Any]]) -> list[float]:
        events = []
        with torch.cuda.device(device):
            for fn in fns:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                fn()
                end.record()
                events.append((start, end))
            torch.cuda.synchronize(device)
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    return measure


def cuda_graph(fn: Callable[[], Any], device: torch.device) -> Callable[[], Any] | str:
    """A call that replays `fn` as one CUDA graph, or the reason why it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and allocates what libraries keep
                fn()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            result = fn()
    except RuntimeError as error:
        return first_line(error)

    def replay(_result: Any = result) -> None:  # the result keeps the graph's memory
        graph.replay()

    return replay
