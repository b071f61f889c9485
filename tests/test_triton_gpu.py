"""What only a GPU can show of the Triton backend: streams, graphs, other devices, no synchronisation, no recompilation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from accuracy import Case, Problem, contract
from triton_interpreter import DEVICE

from lora_kernels import LoRAAdapter, Segments, lora_grouped_linear, lora_linear, multi_lora_linear, quantize_nf4, use_backend
from lora_kernels.backends.triton.kernels import prefill, project

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
BF16, FP32 = torch.bfloat16, torch.float32
CASE = Case(M=257, K=600, N=264, R=16, p=0.3, dtype=BF16, device=DEVICE)


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@contextmanager
def refusing_synchronisation() -> Iterator[None]:
    """Whatever waits for the GPU inside is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layer(problem: Problem, p: float | None = None) -> tuple[torch.Tensor, ...]:
    """y and the gradients of lora_linear with a drawn seed."""
    y = lora_linear(*problem.inputs.values(), scaling=2.0, dropout_p=problem.p if p is None else p)
    return (y.detach(), *torch.autograd.grad(y, list(problem.leaves.values()), problem.dy))


def capture(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """A CUDA graph of call(), and its results. It runs once before: loading a kernel is refused while capturing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_a_side_stream_computes_the_same() -> None:
    problem = replace(CASE, adapter_dtype=FP32).draw()
    want = contract(problem)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = contract(problem)
    stream.synchronize()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    problem = CASE.draw()
    want = contract(problem)
    moved = {name: t.detach().to("cuda:1") for name, t in {**problem.inputs, "dy": problem.dy}.items()}
    for name in problem.leaves:
        moved[name].requires_grad_()
    assert torch.cuda.current_device() == 0
    got = contract(replace(problem, case=replace(CASE, device=torch.device("cuda:1")), **moved))
    assert all(torch.equal(tensor.to("cuda:0"), want[name]) for name, tensor in got.items())


def test_nothing_synchronises_with_the_host() -> None:
    problem = CASE.draw()
    layer(problem)  # compiles
    with refusing_synchronisation():
        layer(problem)


def test_a_captured_graph_draws_a_new_mask_at_each_replay() -> None:
    problem = replace(CASE, M=256, K=512, N=256, adapter_dtype=FP32).draw()
    graph, captured = capture(lambda: layer(problem))
    graph.replay()
    first = [tensor.clone() for tensor in captured]
    graph.replay()
    assert all(torch.isfinite(tensor).all() for tensor in captured)
    random = ("y", "dx", "dA", "dB")  # not dc
    pairs = zip(("y", *(f"d{name}" for name in problem.leaves)), first, captured, strict=True)
    assert not any(torch.equal(old, new) for name, old, new in pairs if name in random)
    without, captured = capture(lambda: layer(problem, p=0.0))
    without.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, layer(problem, p=0.0), strict=True))


def test_values_of_scaling_p_and_m_compile_nothing_new() -> None:
    case = replace(CASE, M=256, K=512, N=256)
    for s in (torch.tensor(0.5, device=DEVICE), 0.5):
        contract(replace(case, scaling=s).draw())
    kernels = [project.project_kernel, prefill.prefill_kernel]
    before = [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]
    for s, p, M in ((1.0, 0.1, 250), (2.0, 0.5, 17), (torch.tensor(1.0, device=DEVICE), 0.9, 129)):
        contract(replace(case, scaling=s, p=p, M=M).draw())
    assert [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels] == before


@pytest.mark.parametrize("form", ["stack", "4-bit stack", "adapters"])
def test_segments_of_ids_on_the_gpu_wait_for_no_host(form: str) -> None:
    """Sorted, computed and differentiated by one graph, whatever the ids are by then."""
    E, M, K, N = 8, 257, 192, 264
    draw = lambda *size: torch.randn(size, device=DEVICE, dtype=BF16) * size[-1] ** -0.5  # noqa: E731
    ids, x, dy = torch.randint(-1, E, (M,), device=DEVICE), draw(M, K).requires_grad_(), draw(M, N)
    A, B, W = draw(E, 16, K).requires_grad_(), draw(E, N, 16).requires_grad_(), draw(E, N, K)
    W = quantize_nf4(W) if form == "4-bit stack" else W[0] if form == "adapters" else W

    def step() -> tuple[torch.Tensor, ...]:
        segments = Segments.from_ids(ids, E)
        if form == "adapters":
            y = multi_lora_linear(x, W, [LoRAAdapter(*pair) for pair in zip(A, B, strict=True)], segments)
        else:
            y = lora_grouped_linear(x[segments.order], W, A, B, segments)
        return (y.detach(), *torch.autograd.grad(y, (x, A, B), dy))

    want = step()
    with refusing_synchronisation():
        got = step()
    graph, captured = capture(step)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))
    assert all(map(torch.equal, captured, want))
    ids.copy_(torch.randint(-1, E, (M,), device=DEVICE))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, step()))
