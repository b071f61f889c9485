"""What only a GPU can show of the CUDA backend: streams, graphs, no synchronisation, more than 2^31 elements, races."""

from types import ModuleType

import pytest
import torch
from test_triton_nf4 import NF4Case
from triton_case import BF16, S, refusing_synchronisation
from triton_interpreter import DEVICE

from lora_kernels import lora_linear, use_backend
from lora_kernels.nf4 import weight as nf4
from lora_kernels.nf4.weight import NF4Weight

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
TOKENS = (4, 16, 257)


@pytest.fixture(autouse=True)
def _only_cuda(cuda: ModuleType):
    with use_backend("cuda"):
        yield


def layer(case: NF4Case, p: float = 0.1) -> tuple[torch.Tensor, ...]:
    """y, dx, dA, dB of lora_linear with a drawn seed."""
    leaves = [t.detach().requires_grad_() for t in (case.x, case.A, case.B)]
    y = lora_linear(leaves[0], case.W, *leaves[1:], case.c, scaling=S, dropout_p=p)
    return (y.detach(), *torch.autograd.grad(y, leaves, case.dy))


@pytest.mark.parametrize("M", TOKENS)
def test_reruns_and_a_side_stream_give_the_same_bits(M: int) -> None:
    case = NF4Case.draw_nf4(M, 4096, 1000, 16, BF16, BF16)
    want = layer(case, p=0.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        with torch.cuda.stream(stream):
            got = layer(case, p=0.0)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("M", TOKENS)
def test_nothing_synchronises_and_a_graph_replays(M: int) -> None:
    case = NF4Case.draw_nf4(M, 512, 264, 16, BF16, BF16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = layer(case, p=0.0)  # compiles, and makes the tables
    with refusing_synchronisation():
        layer(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(case, p=0.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_a_device_that_is_not_the_current_one(cuda: ModuleType) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    W = nf4.quantize_nf4(torch.randn(264, 512, dtype=BF16)).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(cuda.nf4_dequantize(W).cpu(), nf4.dequantize_nf4(W.to("cpu")))


def test_more_than_two_to_the_31_elements(cuda: ModuleType) -> None:
    """Two tiny weights, one behind 2^31 elements of the other: their rows must come out at the end, in every kernel."""
    if torch.cuda.get_device_properties(0).total_memory < 30 << 30:
        pytest.skip("needs 30 GiB")
    K, N, last = 1 << 15, (1 << 16) + 24, 24
    end = nf4.quantize_nf4(torch.randn(last, K, device=DEVICE), double_quant=False)
    codes = torch.full((N * K // 2,), 0x77, dtype=torch.uint8, device=DEVICE)
    absmax = torch.ones(N * K // 64, device=DEVICE)
    codes[-len(end.codes) :], absmax[-len(end.absmax) :] = end.codes, end.absmax
    W = NF4Weight(codes, absmax, None, None, None, torch.Size((N, K)), BF16)
    want = nf4.dequantize_nf4(end.to("cpu"), BF16).to(DEVICE)
    out = cuda.nf4_dequantize(W)
    assert torch.equal(out[-last:], want)
    assert not out[:-last].any()
    again = nf4.quantize_nf4(out, double_quant=False)
    assert torch.equal(again.codes[-len(end.codes) :], nf4.quantize_nf4(want, double_quant=False).codes)
    memory = out.new_full((N, K + 3), 7.0)
    del out
    cuda.nf4_dequantize(W, out=memory[:, :K])
    assert torch.equal(memory[-last:, :K], want)
    assert (memory[:, K:] == 7).all()
    del memory
    x = torch.zeros(16, K, dtype=BF16, device=DEVICE)
    x[range(16), range(K - 16, K)] = 1
    y = cuda.skinny(x, W, x.new_zeros(16, 1), x.new_zeros(N, 1), 1.0, None)
    assert torch.equal(y[:, -last:], want[:, -16:].T)
