"""A layer that is computed within another, in the same thread, by a signal's handler; and in a process that was forked."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from kinds import KINDS, Kind, every_kind
from torch import Tensor
from triton_interpreter import DEVICE

from lora_kernels import cpu_extension, lora_linear, quantize_nf4, use_backend
from lora_kernels.scratch import scratch

Results = tuple[Tensor, ...]


def layer(kind: Kind, rows: int, seed: int) -> Callable[[], Results]:
    """A layer's forward and backward pass: the same results in each call."""
    generator = torch.Generator().manual_seed(seed)
    x, dy, W, A, B = (torch.randn(size, generator=generator) for size in ((rows, 64), (rows, 48), (48, 64), (4, 64), (48, 4)))
    weight = quantize_nf4(W) if kind.quant_type else W
    leaves = [t.requires_grad_() for t in (x, A, B)]

    @torch.enable_grad()  # a handler may run where the interrupted layer wants none
    def compute() -> Results:
        y = lora_linear(x, weight, A, B, dropout_p=0.3, seed=seed)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return compute


def same(results: Results, expected: Results) -> bool:
    return all(torch.equal(t, other) for t, other in zip(results, expected, strict=True))


@contextmanager
def interrupted_by(handler: Callable[[], None]) -> Iterator[None]:
    """The handler runs 0.3 ms after the block began, or after its last run, between two steps of its Python."""
    running = [True]

    def interrupt(*_: object) -> None:
        if running:
            handler()
            signal.setitimer(signal.ITIMER_REAL, 3e-4)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 3e-4)
    try:
        yield
    finally:
        running.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wrong_of(kind: Kind, calls: int) -> tuple[int, int, int]:
    """(wrong results, wrong results of the handler, its calls) of a layer that another interrupts."""
    compute, other = layer(kind, 300, 1), layer(kind, 200, 2)
    expected, expected_of_other = compute(), other()
    nested: list[bool] = []
    wrong = 0
    with interrupted_by(lambda: nested.append(same(other(), expected_of_other))):
        for _ in range(calls):
            wrong += not same(compute(), expected)
    return wrong, nested.count(False), len(nested)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.backend in ("torch", "cpu")], ids=str, indirect=True)
def test_a_signal_s_handler_computes_another_layer(kind):
    wrong, wrong_of_handler, calls = wrong_of(kind, 100)
    assert calls > 10
    assert (wrong, wrong_of_handler) == (0, 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.backend == "torch"], ids=str, indirect=True)
def test_without_the_extension(kind, monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", None)
    assert wrong_of(kind, 25)[:2] == (0, 0)


def test_without_the_count_of_its_users_memory_is_handed_out_twice(monkeypatch):
    monkeypatch.setattr(torch._C, "_storage_Use_Count", lambda _: 0)
    monkeypatch.setattr(cpu_extension, "extension", None)
    with use_backend("torch"):
        tries = (wrong_of(Kind("torch", "nf4"), 50) for _ in range(20))
        assert any(wrong or wrong_of_handler for wrong, wrong_of_handler, _ in tries)


def test_memory_is_kept_while_nobody_reads_it():
    like = torch.empty(0)
    first = scratch("a test", 100, torch.float32, like)
    address, part = first.data_ptr(), first[3:]
    del first
    assert scratch("a test", 50, torch.float32, like).data_ptr() != address
    del part
    assert scratch("a test", 50, torch.float32, like).data_ptr() == address
    assert scratch("a test", 100, torch.uint8, like).data_ptr() == address


@pytest.mark.skipif(DEVICE.type == "cuda", reason="CUDA does not survive a fork")
@every_kind
def test_in_a_forked_process(kind):
    """With one thread, as in a DataLoader's workers: OpenMP's own threads do not survive a fork."""
    compute = layer(kind, 20 if kind.backend in ("triton", "cuda") else 300, 3)
    expected = compute()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if same(compute(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
