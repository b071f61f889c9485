"""4-bit weights in Triton: dequantised bit for bit, and decoded inside the product's loop."""

from dataclasses import replace

import pytest
import torch
from accuracy import Case, broken_results, check, check_contract, contract
from kinds import DTYPES
from torch import Tensor
from triton_interpreter import DEVICE

from lora_kernels import NF4Weight, use_backend
from lora_kernels.backends import nf4_paths
from lora_kernels.backends.triton import linear
from lora_kernels.backends.triton.kernels import nf4_product
from lora_kernels.functional.nf4 import quantize
from lora_kernels.reference.nf4 import dequantize

BF16, FP16, FP32, _ = DTYPES
EVERY_M = nf4_paths.Row("loop", 1, nf4_paths.MANY, None, "for a test")


@pytest.fixture(autouse=True)
def _by_triton() -> None:
    with use_backend("triton"):
        yield


def quantised(W: Tensor, blocksize: int = 64, nested: bool = True, kind: str = "nf4") -> NF4Weight:
    return quantize(W.cpu().float(), kind, blocksize, nested).to(W.device)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, torch.float64])
@pytest.mark.parametrize(("shape", "blocksize", "kind"), [
    ((33, 129), 64, "nf4"), ((40, 96), 32, "fp4"), ((3, 7), 256, "nf4"), ((20, 1000), 4096, "nf4"), ((1, 1), 64, "fp4"),
])  # fmt: skip
def test_dequantise_is_exact(shape: tuple[int, int], blocksize: int, kind: str, dtype: torch.dtype, nested: bool) -> None:
    w = quantised(
        torch.randn(shape, device=DEVICE) * torch.logspace(-8, 8, shape[0], device=DEVICE)[:, None], blocksize, nested, kind
    )
    want = dequantize(w, dtype)
    assert torch.equal(w.dequantize(dtype), want)
    memory = torch.full((shape[0], shape[1] + 3), 7.0, dtype=dtype, device=DEVICE)
    out = memory[:, : shape[1]]
    assert w.dequantize(out=out) is out
    assert torch.equal(out, want)
    assert (memory[:, shape[1] :] == 7).all()
    assert torch.equal(w.dequantize(out=torch.empty(*shape[::-1], dtype=dtype, device=DEVICE).T), want)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward product decodes in its loop."""
    monkeypatch.setattr(nf4_paths, "TABLE", (EVERY_M, nf4_paths.TABLE[-1]))
    called, product = [], nf4_product.product
    monkeypatch.setattr(nf4_product, "product", lambda *args: called.append(1) or product(*args))
    yield
    assert called


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32)])
@pytest.mark.parametrize(("blocksize", "nested", "kind"), [(32, True, "nf4"), (64, True, "nf4"), (128, False, "fp4")])
def test_decoding_in_the_loop(
    loop: None, blocksize: int, nested: bool, kind: str, dtype: torch.dtype, adapter: torch.dtype, p: float
) -> None:
    case = Case(M=70, K=256, N=136, R=12, dtype=dtype, adapter_dtype=adapter, p=p, device=DEVICE)
    check_contract(replace(case, quant_type=kind, blocksize=blocksize, double_quant=nested).draw())


@pytest.mark.parametrize("M", [1, 17, 129])
@pytest.mark.parametrize(("K", "N", "R"), [(32, 1, 1), (96, 65, 24), (160, 200, 64)])
def test_ragged_sizes_in_the_loop(loop: None, M: int, K: int, N: int, R: int) -> None:
    check(Case(M=M, K=K, N=N, R=R, dtype=FP16, p=0.3, quant_type="nf4", blocksize=32, device=DEVICE))


def test_broken_decoding_is_caught(loop: None) -> None:
    """Swapped nibbles, the next block's absmax: the layer's result must show them."""
    problem = Case(M=20, K=128, N=40, R=8, dtype=FP16, quant_type="nf4", needs=(), device=DEVICE).draw()
    W = problem.W
    assert not broken_results(problem, contract(problem))
    for wrong in (
        W.with_tensors(codes=W.codes << 4 | W.codes >> 4),
        W.with_tensors(absmax=W.absmax.roll(1)),
        W.with_tensors(nested_offset=W.nested_offset * 1.02),
    ):
        assert "y" in broken_results(problem, contract(replace(problem, W=wrong)))


def test_what_the_loop_refuses() -> None:
    x, W = torch.randn(3, 72, device=DEVICE).half(), quantised(torch.randn(8, 72, device=DEVICE))
    assert "not whole blocks" in nf4_product.refusal(x, W, 8)
    assert "float32" in nf4_product.refusal(x.float(), W, 8)
    whole = quantised(torch.randn(8, 64, device=DEVICE))
    assert "rank above" in nf4_product.refusal(x[:, :64], whole, 100)
    assert nf4_product.refusal(x[:, :64], whole, 8) is None


def test_the_table_is_read_from_the_top() -> None:
    assert nf4_paths.TABLE[-1] == nf4_paths.Row("scratch", 1, nf4_paths.MANY, None, nf4_paths.TABLE[-1].evidence)
    for M, expected in ((16, "skinny"), (17, "loop"), (256, "loop"), (257, "scratch")):
        assert nf4_paths.path(M, (9, 0), lambda path: None)[0] == expected
    path, why = nf4_paths.path(3, (8, 0), lambda path: "too wide" if path == "skinny" else None)
    assert path == "scratch"
    assert why.startswith("not skinny: too wide; ")
    for row in nf4_paths.TABLE:
        assert row.path in nf4_paths.table()
        assert row.evidence in nf4_paths.table()
    A, W = torch.empty(8, 64, device=DEVICE), quantised(torch.randn(8, 64, device=DEVICE))
    for M, expected in ((5, "scratch"), (40, "loop"), (300, "scratch")):
        assert linear.nf4_path(torch.empty(M, 64, dtype=BF16, device=DEVICE), W, A)[0] == expected


@pytest.mark.parametrize("R", [8, 80])
@pytest.mark.parametrize("M", [3, 40, 257])
def test_every_row_of_the_table_that_is_triton_s(M: int, R: int) -> None:
    check(Case(M=M, K=64, N=24, R=R, dtype=FP16, p=0.3, quant_type="nf4", device=DEVICE))
