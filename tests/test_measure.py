"""measure.py and timing.py: bytes are counted exactly where they can be counted by hand; timings are order statistics."""

import time

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from lora_kernels.commands.measure import held_bytes, kernel_launches, peak_bytes, saved_bytes
from lora_kernels.commands.timing import interleaved, summarize


def test_saved_bytes_counts_an_intermediate_once_however_often_it_is_saved():
    x = torch.randn(10, 20, requires_grad=True)

    def fn():
        y = x.exp()  # saves its result
        return (y * y).sum()  # saves y twice: the same storage

    assert saved_bytes(fn) == 10 * 20 * 4


def test_saved_bytes_counts_views_as_their_whole_storage():
    x = torch.randn(10, 20, requires_grad=True)
    assert saved_bytes(lambda: x[:3].exp().T.square()) == 3 * 20 * 4  # exp's result; square saves a view of it
    assert saved_bytes(lambda: x[:3].square()) == 10 * 20 * 4  # a view of x keeps all of x


def test_saved_bytes_leaves_out_parameters_and_excluded_inputs():
    layer, x = nn.Linear(20, 30), torch.randn(10, 20, requires_grad=True)
    layer.weight.requires_grad_(False)  # frozen: still a parameter, saved for dx as a transposed view
    assert saved_bytes(lambda: layer(x)) == 0
    layer.weight.requires_grad_(True)
    assert saved_bytes(lambda: layer(x)) == x.nbytes
    assert saved_bytes(lambda: layer(x), exclude=[x]) == 0


def test_saved_bytes_does_not_confuse_tensors_that_reuse_an_address():
    x = torch.randn(256, 256, requires_grad=True)

    def fn():
        total = 0
        for _ in range(4):  # each graph is dropped at once: the allocator hands out the same address again
            total += x.exp().sum().item()
        return total

    assert saved_bytes(fn) == 4 * x.nbytes


def test_peak_bytes_is_the_running_maximum_not_the_sum():
    def fn():
        for _ in range(5):
            a = torch.empty(1000, 1000)
            b = a.clone()
            del a, b

    assert peak_bytes(fn) == 2 * 4_000_000


def test_peak_bytes_ignores_what_was_allocated_before():
    held = torch.ones(1000, 1000)
    assert peak_bytes(lambda: held.add_(1)) < 1000
    assert 4_000_000 <= peak_bytes(lambda: held + 1) < 4_001_000


def test_peak_bytes_sees_the_backward_pass():
    x = torch.randn(500, 500, requires_grad=True)
    # exp's result, the gradient of the sum (expanded, no memory), and the product that becomes x.grad
    assert 2 * x.nbytes <= peak_bytes(lambda: x.exp().sum().backward()) < 2 * x.nbytes + 1000


def test_held_bytes_are_those_alive_with_the_result():
    x = torch.randn(500, 500, requires_grad=True)
    assert held_bytes(lambda: x.detach() + 1) == x.nbytes
    assert held_bytes(lambda: x.exp().square()) == 2 * x.nbytes  # exp's result is saved for the backward pass
    assert held_bytes(lambda: (x.detach() + 1).sum() and None) == 0


def test_held_bytes_see_what_checkpointing_keeps():
    x = torch.randn(500, 500, requires_grad=True)

    def chain(value):
        return value.exp().sin().exp().sin()

    plain = held_bytes(lambda: chain(x * 2))
    kept = held_bytes(lambda: torch.utils.checkpoint.checkpoint(chain, x * 2, use_reentrant=False))
    assert plain >= 3 * x.nbytes  # two results of exp and the last
    assert kept <= 2 * x.nbytes + 100_000  # x * 2 and the result; some state of the generator


def test_a_cpu_launches_no_kernels():
    assert kernel_launches(lambda: torch.ones(3), torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_bytes_on_a_gpu():
    assert peak_bytes(lambda: torch.empty(1 << 20, dtype=torch.uint8, device="cuda"), "cuda") == 1 << 20


def test_peak_bytes_refuses_a_device_that_it_cannot_watch():
    with pytest.raises(ValueError, match="got meta, expected cpu or cuda"):
        peak_bytes(lambda: None, "meta")


def test_summarize_is_the_median_and_the_percentiles():
    timing = summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (timing.median, timing.p20, timing.p80, timing.repeats) == (3.5, 2.0, 5.0, 6)
    assert summarize([2.0]).as_dict() == {"median": 2.0, "p20": 2.0, "p80": 2.0, "repeats": 1}


def test_interleaved_runs_every_variant_once_per_round_and_rotates_the_first():
    calls = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleaved(fns, repeats=2, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert list(timings) == ["a", "b", "c"]
    assert all(timing.repeats == 2 for timing in timings.values())


def test_interleaved_gives_each_variant_its_own_time():
    timings = interleaved({"sleep": lambda: time.sleep(0.02), "nothing": lambda: None}, repeats=4, warmup=0)
    assert timings["sleep"].p20 >= 0.02
    assert timings["nothing"].median < timings["sleep"].median


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 0), (1, -1)])
def test_interleaved_refuses_impossible_counts(repeats, warmup):
    with pytest.raises(ValueError, match=f"got {repeats}, {warmup}, expected"):
        interleaved({}, repeats, warmup)
