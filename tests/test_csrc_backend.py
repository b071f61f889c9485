"""The CUDA backend as a layer: which path a call takes, what stays in memory. Its numbers are in test_linear.py."""

import gc
from types import ModuleType

import pytest
import torch
from accuracy import Case, check, check_contract
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import NF4Weight, backend_report, dequantize_nf4, lora_linear, plan, quantize_nf4, use_backend
from lora_kernels.backends import nf4_paths

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _backend(cuda: ModuleType) -> None:
    """Over the emulated extension on a CPU."""


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("M", [1, 8, 16, 17, 40])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, FP32)])
def test_every_dtype_on_every_path(M: int, dtype: torch.dtype, adapter: torch.dtype, p: float, device: torch.device) -> None:
    case = Case(M=M, K=160, N=72, R=12, p=p, dtype=dtype, adapter_dtype=adapter, quant_type="nf4", device=device)
    with use_backend("cuda"):
        check_contract(case.draw(), fresh=True)


@pytest.mark.parametrize(("M", "K", "R"), [(0, 64, 8), (3, 33, 8), (3, 64, 80)])
def test_what_the_skinny_product_leaves_to_others(M: int, K: int, R: int, device: torch.device) -> None:
    with use_backend("cuda"):
        check(Case(M=M, K=K, N=24, R=R, p=0.3, dtype=FP16, quant_type="nf4", device=device))


def test_the_path_of_a_call(cuda: ModuleType, device: torch.device) -> None:
    W, A = quantize_nf4(torch.randn(24, 64)).to(device), torch.randn(8, 64, device=device)

    def path(x: Tensor, W: NF4Weight = W, A: Tensor = A) -> str:
        return "; ".join(cuda.path_of(x, W, A))

    x = torch.randn(300, 64, device=device).to(BF16)
    assert path(x[:16]).startswith("skinny; ")
    assert path(x[:17]).startswith("loop; ")
    assert path(x).startswith("scratch; ")
    assert path(x[:4].float()).startswith("scratch; not skinny: it multiplies bf16 and fp16")
    assert path(x[:4], A=torch.randn(65, 64)).startswith("scratch; not skinny: adapters of rank above 64")
    assert "not aligned" in path(torch.randn(4, 65, device=device).to(BF16)[:, 1:])
    assert "not aligned" in path(x[:4], W.with_tensors(codes=torch.cat([W.codes[:1], W.codes])[1:]))
    odd = quantize_nf4(torch.randn(24, 40)).to(device)
    assert "multiple of 16 codes" in path(x[:4, :40].contiguous(), odd)


def test_decoding_in_the_loop_where_the_table_says_so(
    cuda: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = nf4_paths.Row("loop", 20, 30, None, "a test")
    monkeypatch.setattr(nf4_paths, "TABLE", (row, nf4_paths.TABLE[0], nf4_paths.TABLE[-1]))
    kernels = cuda.triton.nf4_product
    called, product = [], kernels.product
    monkeypatch.setattr(kernels, "product", lambda *args: called.append(len(args[0])) or product(*args))
    for M in (19, 20, 30, 31):
        with use_backend("cuda"):
            check(Case(M=M, K=64, N=40, R=8, p=0.3, dtype=FP16, quant_type="nf4", device=device))
    assert called == [20, 30]


@pytest.mark.parametrize("M", [3, 40, 300])
def test_no_dequantised_weight_survives(M: int, device: torch.device) -> None:
    """Between forward and backward there is nothing of W's dense size, neither saved nor alive."""
    N, K = 136, 192
    W = quantize_nf4(torch.randn(N, K)).to(device)
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


def test_reports_and_requests(device: torch.device) -> None:
    x, dense = torch.randn(3, 64, device=device, dtype=FP16), torch.randn(24, 64, device=device, dtype=FP16)
    W, A, B = quantize_nf4(dense), torch.randn(8, 64, device=device), torch.randn(24, 8, device=device)

    def row(*tensors: Tensor | NF4Weight) -> plan.BackendRow:
        return next(row for row in backend_report(x, *tensors) if row.backend == "cuda")

    assert row(W, A, B).used if device.type == "cuda" else "emulation" in row(W, A, B).reason
    assert "kernels are for 4-bit weights" in row(dense, A, B).reason
    assert "no 4-bit weight" in row().reason
    with use_backend("cuda"):
        assert row(W, A, B).used
        assert row(None, A, B).used  # a backward pass without dx
        with pytest.raises(RuntimeError, match="kernels are for 4-bit weights"):
            lora_linear(x, dense, A, B)


def test_the_emulation_is_never_handed_a_gpu_s_addresses(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.extension, "EMULATED", True)
    assert "runs on CPU tensors only" in cuda.extension.why_not(torch.device("cuda"), "cuda")
    assert cuda.extension.why_not(torch.device("cpu"), "cuda") is None
    monkeypatch.setattr(cuda.extension, "EMULATED", False)
    assert cuda.extension.why_not(torch.device("cpu"), "cuda") == "needs CUDA tensors, got cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("M", [1, 16, 512])
def test_peak_memory_on_a_gpu(M: int) -> None:
    """Few tokens: y alone. Many: y and one dequantised W."""
    N, K = 4096, 4096
    x = torch.randn(M, K, device="cuda", dtype=BF16)
    W = quantize_nf4(torch.randn(N, K, device="cuda"))
    A, B = torch.randn(16, K, device="cuda", dtype=BF16), torch.randn(N, 16, device="cuda", dtype=BF16)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with use_backend("cuda"):
            y = lora_linear(x, W, A, B, scaling=2.0)
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
    dense = 2 * N * K if M > 256 else 0
    assert extra <= dense + (8 << 20)


def test_the_public_functions_take_the_kernels(cuda: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize_nf4 and dequantize_nf4 are one launch; use_backend("torch") keeps PyTorch's operations."""
    values, kernels = torch.randn(24, 100, device=device), plan.load("cuda", "nf4")
    with use_backend("cuda"):
        assert next(plan.modules("nf4")) is kernels
        assert kernels.why_not(values) is None
    with use_backend("torch"):
        assert next(plan.modules("nf4")) is plan.load("torch", "nf4")
    with use_backend("triton"):
        first, second = plan.modules("nf4")
        assert first is plan.load("triton", "nf4")
        assert not hasattr(first, "quantize")
        assert second is plan.load("torch", "nf4")
    called = []
    for name in ("quantize", "dequantize"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, name=name, kernel=kernel: called.append(name) or kernel(*args))
    with use_backend("cuda"):
        W = quantize_nf4(values)
        dense = dequantize_nf4(W, out=torch.empty(24, 100, device=device))
    assert called == ["quantize", "dequantize"]
    with use_backend("torch"):
        assert torch.equal(dense, dequantize_nf4(W))
        assert torch.equal(W.codes, quantize_nf4(values).codes)


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
        check(Case(K=96, N=40, R=8, p=p, device=device, quant_type="nf4", **options))


@pytest.mark.parametrize("M", [6, 21])
def test_checkpointing_and_compiling(M: int, device: torch.device) -> None:
    W = quantize_nf4(torch.randn(40, 64)).to(device)
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
