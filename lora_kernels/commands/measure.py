"""Memory and time of a callable: what autograd saves, what stays allocated, the peak, and medians of interleaved runs.

The command line, the benchmark and the tests all count with these functions, so that their numbers mean the same.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def saved_bytes(fn: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass while `fn()` runs.

    A storage counts once and whole, however many views of it are saved. Not counted: parameters (frozen ones too), the
    storages of `exclude` (an input that the caller holds anyway), and what an operator keeps as a Python attribute
    instead of through autograd.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # The storages themselves are kept, so that an address freed during fn() cannot come back as another tensor's.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not parameter and storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = fn()  # held until the count is done
    total = sum(storage.nbytes() for storage in saved.values())
    del result
    return total


def peak_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes allocated at once on `device` during `fn()`, beyond those allocated when it starts.

    CUDA: the caching allocator's `max_memory_allocated`, which does not see the workspaces of libraries that allocate
    on their own. CPU: exact for torch's allocator, the running maximum over the profiler's allocation events; scratch
    memory that oneDNN, MKL or NumPy take by themselves is not seen. Memory that fn() frees without having allocated it
    counts as a credit on both.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    if device.type != "cpu":
        raise ValueError(f"device: got {device}, expected cpu or cuda")
    return _peak_bytes_cpu(fn)


def _peak_bytes_cpu(fn: Callable[[], Any]) -> int:
    held = peak = 0
    for _, size in sorted(_allocations(fn), key=lambda event: event[0]):  # stable: equal times stay in their order
        held += size
        peak = max(peak, held)
    return peak


def _allocations(fn: Callable[[], Any]) -> list[tuple[int, int]]:
    """(nanosecond, bytes) of everything that torch's CPU allocator gives out or, negative, takes back during `fn()`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler otherwise writes two lines to stderr at every use
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fn()
    # The public views sum the events per operator; a running maximum needs them one by one.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [(event.start_ns(), event.nbytes()) for event in events]


def held_bytes(fn: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Bytes that are still allocated on `device` after `fn()`, its result alive, beyond those allocated when it starts.

    Counted as in `peak_bytes`. Of a forward pass it is everything that waits for the backward pass, results included,
    under activation checkpointing too, where autograd's hooks do not see what is kept.
    """
    device = torch.device(device)
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        result = fn()
        held = torch.cuda.memory_allocated(device) - start
        del result
        return held
    results: list[Any] = []
    return sum(size for _, size in _allocations(lambda: results.append(fn())))


def kernel_launches(fn: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels, copies and fills that one call of `fn` puts on a CUDA device, by the profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        fn()
        torch.cuda.synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())


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
        return str(error).strip().partition("\n")[0]

    def replay(_result: Any = result) -> None:  # the result keeps the graph's memory
        graph.replay()

    return replay


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
