"""The Triton backend over 4-bit weights: dequantised bit for bit, products and gradients against float64."""

import pytest
import torch
from torch import Tensor
from triton_case import ALL, BF16, FP16, FP32, Case, S, backend
from triton_interpreter import DEVICE

from lora_kernels.backends import nf4_paths as nf4_plan
from lora_kernels.backends.torch.linear import Needs
from lora_kernels.backends.triton import forward, nf4, tuning
from lora_kernels.nf4 import weight as format_nf4
from lora_kernels.nf4.weight import NF4Weight

EVERY_M = nf4_plan.Row("loop", 1, nf4_plan.MANY, None, "for a test")


def quantised(W: Tensor, blocksize: int = 64, nested: bool = True, kind: str = "nf4") -> NF4Weight:
    return format_nf4.quantize(W.cpu().float(), kind, blocksize, nested).to(W.device)


def exact(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    """W by PyTorch operations on the CPU, on w's device."""
    return format_nf4.dequantize_nf4(w.to("cpu"), dtype).to(w.device)


class NF4Case(Case):
    """The same layer with its weight in 4 bits; truth and plain PyTorch get it dequantised in x's dtype."""

    @classmethod
    def draw_nf4(cls, *sizes, blocksize: int = 64, nested: bool = True, kind: str = "nf4", **options) -> "NF4Case":
        case = cls.draw(*sizes, **options)
        case.W = quantised(case.W, blocksize, nested, kind)
        return case

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        W, self.W = self.W, exact(self.W, self.x.dtype)
        try:
            return super().plain(dtype)
        finally:
            self.W = W


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("shape", "blocksize", "kind"), [
    ((33, 129), 64, "nf4"), ((40, 96), 32, "fp4"), ((3, 7), 256, "nf4"), ((20, 1000), 4096, "nf4"), ((1, 1), 64, "fp4"),
])  # fmt: skip
def test_dequantise_is_exact(shape: tuple[int, int], blocksize: int, kind: str, dtype: torch.dtype, nested: bool) -> None:
    w = quantised(
        torch.randn(shape, device=DEVICE) * torch.logspace(-8, 8, shape[0], device=DEVICE)[:, None], blocksize, nested, kind
    )
    want = exact(w, dtype)
    assert torch.equal(nf4.dequantize(w, dtype), want)
    assert torch.equal(backend.nf4_dequantize(w, dtype), want)
    memory = torch.full((shape[0], shape[1] + 3), 7.0, dtype=dtype, device=DEVICE)
    out = memory[:, : shape[1]]
    assert nf4.dequantize(w, out=out) is out
    assert torch.equal(out, want)
    assert (memory[:, shape[1] :] == 7).all()
    assert torch.equal(nf4.dequantize(w, out=torch.empty(*shape[::-1], dtype=dtype, device=DEVICE).T), want)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)])
def test_layer_through_a_dequantised_weight(dtype: torch.dtype, adapter: torch.dtype, p: float) -> None:
    case = NF4Case.draw_nf4(33, 136, 72, 12, dtype, adapter, p)
    case.check(case.run())


@pytest.mark.parametrize("R", [8, 80])
@pytest.mark.parametrize("M", [0, 3])
def test_empty_batch_and_wide_rank(M: int, R: int) -> None:
    case = NF4Case.draw_nf4(M, 40, 24, R)
    case.check(case.run()) if M else case.run()


@pytest.mark.parametrize("needs", [ALL, Needs(False, True, True, False), Needs(True, False, False, False)])
def test_only_the_wanted_gradients(needs: Needs) -> None:
    case = NF4Case.draw_nf4(20, 64, 40, 8)
    case.check(case.run(needs=needs))


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward product decodes in its loop."""
    monkeypatch.setattr(nf4_plan, "TABLE", (EVERY_M, nf4_plan.TABLE[-1]))
    called = []
    product = nf4.product
    monkeypatch.setattr(nf4, "product", lambda *args: called.append(1) or product(*args))
    yield
    assert called


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32)])
@pytest.mark.parametrize(("blocksize", "nested", "kind"), [(32, True, "nf4"), (64, True, "nf4"), (128, False, "fp4")])
def test_decoding_in_the_loop(
    loop: None, blocksize: int, nested: bool, kind: str, dtype: torch.dtype, adapter: torch.dtype, p: float
) -> None:
    case = NF4Case.draw_nf4(70, 256, 136, 12, dtype, adapter, p, blocksize=blocksize, nested=nested, kind=kind)
    case.check(case.run())


@pytest.mark.parametrize("M", [1, 17, 129])
@pytest.mark.parametrize(("K", "N", "R"), [(32, 1, 1), (96, 65, 24), (160, 200, 64)])
def test_ragged_sizes_in_the_loop(loop: None, M: int, K: int, N: int, R: int) -> None:
    case = NF4Case.draw_nf4(M, K, N, R, FP16, FP16, blocksize=32)
    case.check(case.run())


def test_broken_decoding_is_caught(loop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Swapped nibbles, the next block's absmax: the layer's result must show them."""
    case = NF4Case.draw_nf4(20, 128, 40, 8)
    case.run()
    codes = case.W.codes
    wrong = {
        "nibbles": case.W.with_tensors(codes=codes << 4 | codes >> 4),
        "absmax": case.W.with_tensors(absmax=case.W.absmax.roll(1)),
        "offset": case.W.with_tensors(nested_offset=case.W.nested_offset * 1.02),
    }
    for W in wrong.values():
        right, case.W = case.W, W
        y = case.run()["y"]
        case.W = right
        with pytest.raises(AssertionError):
            case.check({"y": y})


@pytest.fixture
def concat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward product is one with [W|s·B]."""
    monkeypatch.setattr(nf4_plan, "TABLE", (nf4_plan.Row("concat", 1, nf4_plan.MANY, None, "a test"), nf4_plan.TABLE[-1]))


@pytest.mark.parametrize(("M", "K", "N", "R"), [(2, 32, 24, 1), (17, 65, 40, 12), (129, 96, 65, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_concatenated(concat: None, dtype: torch.dtype, M: int, K: int, N: int, R: int) -> None:
    case = NF4Case.draw_nf4(M, K, N, R, dtype, dtype, 0.3, blocksize=32)
    case.check(case.run())
    case.check(case.run(torch.tensor(S, device=DEVICE)))


def test_broken_concatenation_is_caught(concat: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = NF4Case.draw_nf4(17, 96, 65, 12)
    project = forward.project
    monkeypatch.setattr(forward, "project", lambda *args: project(*args) * 0.97)
    with pytest.raises(AssertionError):
        case.check({"y": case.run()["y"]})


def test_why_not_concatenated() -> None:
    x, A = torch.empty(2, 96, dtype=BF16, device=DEVICE), torch.empty(80, 96, dtype=BF16, device=DEVICE)
    assert "rank above" in nf4.concat_refusal(x, A)
    assert "float32" in nf4.concat_refusal(x, A.float())
    assert nf4.concat_refusal(x, A[:64]) is None


def test_why_not_the_loop() -> None:
    x = torch.empty(2, 96, dtype=BF16, device=DEVICE)
    W = quantised(torch.randn(8, 96, device=DEVICE))
    assert "not whole blocks" in nf4.refusal(x, W, 8)
    assert "float32" in nf4.refusal(x.float(), W, 8)
    assert "rank above" in nf4.refusal(x[:, :64], quantised(torch.randn(8, 64, device=DEVICE)), 100)
    assert nf4.refusal(x[:, :64], quantised(torch.randn(8, 64, device=DEVICE)), 8) is None


def test_the_plan_is_read_from_the_top() -> None:
    assert nf4_plan.TABLE[-1] == nf4_plan.Row("scratch", 1, nf4_plan.MANY, None, nf4_plan.TABLE[-1].evidence)
    assert nf4_plan.path(16, (9, 0), lambda path: None)[0] == "skinny"
    assert nf4_plan.path(17, (9, 0), lambda path: None)[0] == "scratch"
    path, why = nf4_plan.path(3, (8, 0), lambda path: "too wide" if path == "skinny" else None)
    assert path == "scratch"
    assert why.startswith("not skinny: too wide; ")
    for row in nf4_plan.TABLE:
        assert row.path in nf4_plan.table()
        assert row.evidence in nf4_plan.table()
    x, A = torch.empty(5, 64, dtype=BF16, device=DEVICE), torch.empty(8, 64, device=DEVICE)
    assert backend.plan(x, quantised(torch.randn(8, 64, device=DEVICE)), A)[0] == "scratch"
    assert tuning.gpu(x.device)
