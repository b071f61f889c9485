"""Memory and launches of a callable: what autograd saves, what stays allocated, the peak, and the kernels of a call.

The command line, the benchmark and the tests all count with these functions, so that their numbers mean the same.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


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
