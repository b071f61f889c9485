"""The CUDA backend as a layer: every option against float64, which path a call takes, what stays in memory."""

import gc
import itertools
from types import ModuleType

import pytest
import torch
import triton_case
from accuracy import Case
from test_nf4_linear import check as check_layer
from test_triton_nf4 import NF4Case
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton_case import BF16, FP16, FP32

from lora_kernels import backend_report, lora_linear, use_backend
from lora_kernels import plan as backends
from lora_kernels.backends import nf4_paths as nf4_plan
from lora_kernels.backends.torch.linear import Needs
from lora_kernels.nf4 import weight as nf4


@pytest.fixture(autouse=True)
def _backend(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_case, "backend", cuda)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("M", [1, 8, 16, 17, 40])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, FP32)])
def test_every_dtype(M: int, dtype: torch.dtype, adapter: torch.dtype, p: float) -> None:
    case = NF4Case.draw_nf4(M, 160, 72, 12, dtype, adapter, p)
    case.check(case.run())


@pytest.mark.parametrize("needs", [Needs(*n) for n in itertools.product([False, True], repeat=4)])
@pytest.mark.parametrize("M", [5, 24])
def test_only_the_wanted_gradients(M: int, needs: Needs) -> None:
    case = NF4Case.draw_nf4(M, 64, 40, 8)
    case.check(case.run(needs=needs))


@pytest.mark.parametrize(("M", "K", "R"), [(0, 64, 8), (3, 33, 8), (3, 64, 80)])
def test_what_the_skinny_product_leaves_to_others(M: int, K: int, R: int) -> None:
    case = NF4Case.draw_nf4(M, K, 24, R)
    if M:
        case.check(case.run())
    else:
        assert case.run()["y"].shape == (0, 24)


def test_the_path_of_a_call(cuda: ModuleType, device: torch.device) -> None:
    W, A = nf4.quantize_nf4(torch.randn(24, 64)).to(device), torch.randn(8, 64, device=device)

    def path(x: Tensor, W: nf4.NF4Weight = W, A: Tensor = A) -> str:
        return "; ".join(cuda.plan(x, W, A))

    x = torch.randn(40, 64, device=device).to(BF16)
    assert path(x[:16]).startswith("skinny; ")
    assert path(x).startswith("scratch; ")
    assert path(x[:4].float()).startswith("scratch; not skinny: it multiplies bf16 and fp16")
    assert path(x[:4], A=torch.randn(65, 64)).startswith("scratch; not skinny: adapters of rank above 64")
    assert "not aligned" in path(torch.randn(4, 65, device=device).to(BF16)[:, 1:])
    assert "not aligned" in path(x[:4], W.with_tensors(codes=torch.cat([W.codes[:1], W.codes])[1:]))
    odd = nf4.quantize_nf4(torch.randn(24, 40)).to(device)
    assert "multiple of 16 codes" in path(x[:4, :40].contiguous(), odd)


def test_decoding_in_the_loop_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_plan, "TABLE", (nf4_plan.Row("loop", 20, 30, None, "a test"), *nf4_plan.TABLE))
    from lora_kernels.backends.triton import nf4 as kernels

    called, product = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args: called.append(len(args[0])) or product(*args))
    for M in (19, 20, 30, 31):
        case = NF4Case.draw_nf4(M, 64, 40, 8)
        case.check(case.run())
    assert called == [20, 30]


@pytest.mark.parametrize("M", [3, 40])
def test_no_dequantised_weight_survives(cuda: ModuleType, M: int, device: torch.device) -> None:
    """Between forward and backward there is nothing of W's dense size, neither saved nor alive."""
    N, K = 136, 192
    W = nf4.quantize_nf4(torch.randn(N, K)).to(device)
    x = torch.randn(M, K, device=device).to(BF16).requires_grad_()
    A, B = (torch.randn(shape, device=device).to(BF16).requires_grad_() for shape in ((8, K), (N, 8)))
    saved: list[Tensor] = []
    with use_backend("cuda"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, W, A, B, scaling=2.0)
        gc.collect()
        alive = [t for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point() and t.numel() == N * K]
        assert not alive
        assert sum(t.nbytes for t in saved) <= W.nbytes + x.nbytes + A.nbytes + B.nbytes + M * 8 * 2
        y.sum().backward()
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point() and t.numel() == N * K]


def test_reports_and_requests(cuda: ModuleType, device: torch.device) -> None:
    x, dense = torch.randn(3, 64, device=device, dtype=FP16), torch.randn(24, 64, device=device, dtype=FP16)
    W, A, B = nf4.quantize_nf4(dense), torch.randn(8, 64, device=device), torch.randn(24, 8, device=device)
    rows = {row.backend: row for row in backend_report(x, W, A, B)}
    assert rows["cuda"].used if device.type == "cuda" else "emulation" in rows["cuda"].reason
    assert "kernels are for 4-bit weights" in backends.why_not("cuda", x, dense, A, B)
    assert "no 4-bit weight" in backends.why_not("cuda", x, None, A, B)
    with use_backend("cuda"):
        assert backends.choose(x, W, A, B) is cuda
        assert backends.choose(x, None, A, B) is cuda  # a backward pass without dx
        with pytest.raises(RuntimeError, match="kernels are for 4-bit weights"):
            lora_linear(x, dense, A, B)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("M", [1, 16, 512])
def test_peak_memory_on_a_gpu(cuda: ModuleType, M: int) -> None:
    """Few tokens: y alone. Many: y and one dequantised W."""
    N, K = 4096, 4096
    x = torch.randn(M, K, device="cuda", dtype=BF16)
    W = nf4.quantize_nf4(torch.randn(N, K, device="cuda"))
    A, B = torch.randn(16, K, device="cuda", dtype=BF16), torch.randn(N, 16, device="cuda", dtype=BF16)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y, _ = cuda.lora_forward(x, W, A, B, 2.0, None, 0.0, None)
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    dense = 2 * N * K if M > 16 else 0
    assert extra <= dense + (8 << 20)


def test_the_public_functions_take_the_kernels(cuda: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU quantize_nf4 and dequantize_nf4 are one launch; use_backend("torch") keeps PyTorch's operations."""
    values = torch.randn(24, 100, device=device)
    with use_backend("cuda"):
        assert backends.nf4_kernels(values, "nf4_quantize") is cuda
        assert backends.nf4_kernels(values, "nf4_dequantize") is cuda
    with use_backend("torch"):
        assert backends.nf4_kernels(values, "nf4_dequantize") is None
    with use_backend("triton"):
        assert backends.nf4_kernels(values, "nf4_dequantize") is backends.load("triton")
        assert backends.nf4_kernels(values, "nf4_quantize") is None
    called = []
    for name in ("nf4_quantize", "nf4_dequantize"):
        kernel = getattr(cuda, name)
        monkeypatch.setattr(
            cuda, name, lambda *args, name=name, kernel=kernel, **options: called.append(name) or kernel(*args, **options)
        )
    monkeypatch.setattr(nf4, "_kernels", backends.nf4_kernels)  # as for a CUDA tensor
    with use_backend("cuda"):
        W = nf4.quantize_nf4(values)
        dense = nf4.dequantize_nf4(W, out=torch.empty(24, 100, device=device))
    assert called == ["nf4_quantize", "nf4_dequantize"]
    with use_backend("torch"):
        assert torch.equal(dense, nf4.dequantize_nf4(W))
        assert torch.equal(W.codes, nf4.quantize_nf4(values).codes)


OPTIONS = {
    "autocast": {"dtype": FP32, "adapter_dtype": FP32, "autocast": BF16},
    "strided": {"strided": True},
    "fp32 adapters": {"adapter_dtype": FP32},
    "no bias": {"bias": False},
    "frozen A": {"needs": ("x", "B", "c")},
    "frozen x": {"needs": ("A", "B")},
    "4-D x": {"M": (2, 1, 3, 2)},
    "scaling in a tensor": {"scaling": torch.tensor(0.75)},
    "fp32": {"dtype": FP32},
}


@pytest.mark.parametrize("M", [6, 21])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_layer(option: str, p: float, M: int, device: torch.device) -> None:
    options = {"M": M, "dtype": BF16, **OPTIONS[option]}
    if option == "scaling in a tensor":
        options["scaling"] = options["scaling"].to(device)
    with use_backend("cuda"):
        check_layer(Case(K=96, N=40, R=8, p=p, device=device, **options))


@pytest.mark.parametrize("M", [6, 21])
def test_checkpointing_and_compiling(M: int, device: torch.device) -> None:
    W = nf4.quantize_nf4(torch.randn(40, 64)).to(device)
    x = torch.randn(M, 64, device=device).to(BF16).requires_grad_()
    A, B = (torch.randn(shape, device=device).to(BF16).requires_grad_() for shape in ((8, 64), (40, 8)))

    def layer(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, W, A, B, scaling=0.5, dropout_p=0.2, seed=5)

    with use_backend("cuda"):
        want = torch.autograd.grad(layer(x, A, B).sum(), (x, A, B))
        again = torch.autograd.grad(checkpoint(layer, x, A, B, use_reentrant=False).sum(), (x, A, B))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        third = torch.autograd.grad(compiled(x, A, B).sum(), (x, A, B))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(want, again, third, strict=True))
