"""What only a GPU can show of the Triton backend: streams, graphs, other devices, no synchronisation, no recompilation."""

import pytest
import torch
from triton_case import BF16, FP32, Case, S, refusing_synchronisation
from triton_interpreter import DEVICE

from lora_kernels import lora_linear, use_backend
from lora_kernels.backends.triton import forward

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


def layer(case: Case, p: float | None = None) -> tuple[torch.Tensor, ...]:
    """y, dx, dA, dB of lora_linear with a drawn seed."""
    leaves = [t.detach().requires_grad_() for t in (case.x, case.A, case.B)]
    x, A, B = leaves
    y = lora_linear(x, case.W, A, B, case.c, scaling=S, dropout_p=case.p if p is None else p)
    return (y.detach(), *torch.autograd.grad(y, leaves, case.dy))


def test_a_side_stream_computes_the_same() -> None:
    case = Case.draw(257, 600, 264, 16, BF16, FP32)
    want = case.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = case.run()
    stream.synchronize()
    assert all(torch.equal(tensor, want[name]) for name, tensor in got.items())


def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = Case.draw(129, 600, 264, 16)
    want = case.run()
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(tensor.to("cuda:0"), want[name]) for name, tensor in case.run().items())


def test_nothing_synchronises_with_the_host() -> None:
    case = Case.draw(257, 600, 264, 16, BF16, BF16)
    with use_backend("triton"):
        layer(case)  # compiles
        with refusing_synchronisation():
            layer(case)


def test_a_captured_graph_draws_a_new_mask_at_each_replay() -> None:
    case = Case.draw(256, 512, 256, 16, BF16, FP32)
    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(case)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(case)
        graph.replay()
        first = [tensor.clone() for tensor in captured]
        graph.replay()
        assert all(torch.isfinite(tensor).all() for tensor in captured)
        assert not any(torch.equal(old, new) for old, new in zip(first, captured, strict=True))
        without = torch.cuda.CUDAGraph()
        with torch.cuda.graph(without):
            captured = layer(case, p=0.0)
        without.replay()
        assert all(torch.equal(got, want) for got, want in zip(captured, layer(case, p=0.0), strict=True))


def test_values_of_scaling_p_and_m_compile_nothing_new() -> None:
    case = Case.draw(256, 512, 256, 16)
    case.run(torch.tensor(0.5, device=DEVICE))
    case.run(0.5)
    kernels = [forward.project_kernel, forward.prefill_kernel]
    before = [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]
    for s, p, M in ((1.0, 0.1, 250), (2.0, 0.5, 17), (torch.tensor(1.0, device=DEVICE), 0.9, 129)):
        other = Case.draw(M, 512, 256, 16, p=p)
        other.run(s)
    assert [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels] == before
