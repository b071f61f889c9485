"""What only a GPU can show of the CUDA backend: streams, graphs, no synchronisation, more than 2^31 elements, races."""

from types import ModuleType

import pytest
import torch
from accuracy import Case, Problem
from csrc_emulator import dequantised
from test_triton_gpu import capture, layer, refusing_synchronisation
from triton_interpreter import DEVICE

from lora_kernels import NF4Weight, dequantize_nf4, quantize_nf4, use_backend

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
BF16 = torch.bfloat16
TOKENS = (4, 16, 64, 257)


@pytest.fixture(autouse=True)
def _only_cuda(cuda: ModuleType):
    with use_backend("cuda"):
        yield


def draw(M: int, K: int, N: int) -> Problem:
    return Case(M=M, K=K, N=N, R=16, p=0.1, dtype=BF16, quant_type="nf4", device=DEVICE).draw()


@pytest.mark.parametrize("M", TOKENS)
def test_reruns_and_a_side_stream_give_the_same_bits(M: int) -> None:
    case = draw(M, 4096, 1000)
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
    case = draw(M, 512, 264)
    want = layer(case, p=0.0)  # compiles, and makes the tables
    layer(case)
    with refusing_synchronisation():
        layer(case)
    graph, captured = capture(lambda: layer(case, p=0.0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_a_device_that_is_not_the_current_one(cuda: ModuleType) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    W = quantize_nf4(torch.randn(264, 512, dtype=BF16)).to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(dequantised(W).cpu(), dequantize_nf4(W.to("cpu")))


def test_more_than_two_to_the_31_elements(cuda: ModuleType) -> None:
    """Two tiny weights, one behind 2^31 elements of the other: their rows must come out at the end, in every kernel."""
    if torch.cuda.get_device_properties(0).total_memory < 30 << 30:
        pytest.skip("needs 30 GiB")
    K, N, last = 1 << 15, (1 << 16) + 24, 24
    end = quantize_nf4(torch.randn(last, K, device=DEVICE), double_quant=False)
    codes = torch.full((N * K // 2,), 0x77, dtype=torch.uint8, device=DEVICE)
    absmax = torch.ones(N * K // 64, device=DEVICE)
    codes[-len(end.codes) :], absmax[-len(end.absmax) :] = end.codes, end.absmax
    W = NF4Weight(codes, absmax, None, None, None, torch.Size((N, K)), BF16)
    want = dequantize_nf4(end.to("cpu"), BF16).to(DEVICE)
    out = dequantised(W)
    assert torch.equal(out[-last:], want)
    assert not out[:-last].any()
    again = quantize_nf4(out, double_quant=False)
    assert torch.equal(again.codes[-len(end.codes) :], quantize_nf4(want, double_quant=False).codes)
    memory = out.new_full((N, K + 3), 7.0)
    del out
    dequantised(W, out=memory[:, :K])
    assert torch.equal(memory[-last:, :K], want)
    assert (memory[:, K:] == 7).all()
    del memory
    x = torch.zeros(16, K, dtype=BF16, device=DEVICE)
    x[range(16), range(K - 16, K)] = 1
    y = cuda.skinny(x, W, x.new_zeros(16, 1), x.new_zeros(N, 1), 1.0, None)
    assert torch.equal(y[:, -last:], want[:, -16:].T)
