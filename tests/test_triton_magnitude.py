"""DoRA's kernels: norms of rows of W + s·B·A, the scale and its gradients, against float64 and in the layer."""

import itertools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, check_contract, contract, nan_in_fresh_memory
from kinds import DTYPES
from members_accuracy import check as check_members
from torch import Tensor
from triton_interpreter import DEVICE

from lora_kernels import dora_norm, use_backend
from lora_kernels.backends.torch import linear as pytorch
from lora_kernels.backends.triton import compilation, linear, magnitude, planning
from lora_kernels.backends.triton.kernels import row_norm
from lora_kernels.backends.triton.kernels.tiles import dot
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer
from lora_kernels.cases.rule import Results, violations
from lora_kernels.functional.nf4 import quantize
from lora_kernels.plan import choose, describe
from lora_kernels.reference import magnitude as reference
from lora_kernels.reference.nf4 import dequantize

BF16, FP16, FP32, FP64 = DTYPES
PAIRS = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP16, FP32), (FP16, BF16), (FP32, BF16)]
SUBSETS = list(itertools.product([False, True], repeat=3))


@pytest.fixture(autouse=True)
def _by_triton() -> None:
    with use_backend("triton"), nan_in_fresh_memory():
        yield


def apart(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values without gaps, in memory that holds NaN before and after them."""
    memory = torch.full((torch.Size(shape).numel() + 48,), torch.nan, dtype=dtype, device=DEVICE)
    found = memory[16:-32].view(shape)
    return found.copy_(torch.randn(shape) * scale)


def strided(t: Tensor, how: str) -> Tensor:
    """The values of t[N, K] in other places, NaN between and around them."""
    N, K = t.shape
    if how == "expanded":
        return t[:1].expand(N, K)
    down, across = (2, 3) if how == "columns" else (1, 1)
    sizes = (across * K + 5, down * N + 5) if how == "transposed" else (down * N + 5, across * K + 5)
    memory = torch.full(sizes, torch.nan, dtype=t.dtype, device=t.device)
    view = memory.T if how == "transposed" else memory
    return view[1::down, 2::across][:N, :K].copy_(t)


def judged(tested: Results, plain: Results, exact: Results, dtype: torch.dtype) -> None:
    assert not (broken := violations(tested, plain, exact, dtype)), broken


def check_norm(W, A: Tensor, B: Tensor, s: float | Tensor, dtype: torch.dtype, truncated: bool = False) -> None:
    """By the rule for float32: operands are read as they are. truncated: sums of B·A may be, for twice PyTorch's error."""
    n = magnitude.norm(W, A, B, s, dtype)
    dense = W if isinstance(W, Tensor) else dequantize(W, dtype)
    assert n.dtype == FP32
    exact = reference.norm(dense.double(), A.double(), B.double(), float(s))
    plain = reference.norm(dense, A, B, float(s))
    judged({"n": n}, {"n": exact + 2 * (plain - exact) if truncated else plain}, {"n": exact}, FP32)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("N", "K", "R"), [(1, 1, 1), (33, 129, 5), (70, 300, 16), (3, 1000, 64)])
def test_norms_of_any_size(pair: tuple[torch.dtype, torch.dtype], N: int, K: int, R: int) -> None:
    """K is split where N is small."""
    dtype, adapter = pair
    W, A, B = apart(N, K, dtype=dtype), apart(R, K, dtype=adapter), apart(N, R, dtype=adapter)
    check_norm(W, A, B, torch.tensor(0.5, device=DEVICE), dtype)


@pytest.mark.parametrize("how", ["rows", "columns", "transposed", "expanded"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_norms_of_any_strides(how: str, dtype: torch.dtype) -> None:
    W, A, B = apart(50, 136, dtype=dtype), apart(12, 136, dtype=dtype), apart(50, 12, dtype=dtype)
    check_norm(strided(W, how), strided(A, "transposed"), strided(B, "columns"), 2.0, dtype)


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_norms_where_the_update_cancels_the_weight(pair: tuple[torch.dtype, torch.dtype], noise: float) -> None:
    """What remains is the rounding of W and some noise: float32 adapters beside a 16-bit W are multiplied as such.

    s is a power of two: PyTorch multiplies B by it before, the kernel the product after, and here each rounding counts. A
    GPU's 16-bit products drop the low bits of their sums (an H200: 1.9 times the error of PyTorch's float32 ones).
    """
    check_norm(*cancelling(*pair, noise), 2.0, pair[0], truncated=DEVICE.type == "cuda" and pair[0] == BF16)


def cancelling(dtype: torch.dtype, adapter: torch.dtype, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B with W + 2·B·A near zero."""
    A, B = apart(8, 300, dtype=adapter), apart(40, 8, dtype=adapter)
    return (-2 * (B.double() @ A.double()) * (1 + noise * torch.randn(40, 300, device=DEVICE))).to(dtype), A, B


@triton.jit
def update_by_dot(b_B, b_A, PRECISION: tl.constexpr):
    return dot(b_B, b_A, None, PRECISION)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
def test_a_product_of_two_parts_is_caught_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_norm, "update_of", update_by_dot)
    with pytest.raises(AssertionError, match="n: "):
        check_norm(*cancelling(BF16, FP32, 1e-5), 2.0, BF16)


@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP32), (FP32, FP32)])
@pytest.mark.parametrize(("kind", "blocksize", "nested", "K"), [
    ("nf4", 64, True, 192), ("fp4", 32, False, 160), ("nf4", 256, True, 768), ("nf4", 64, True, 100), ("fp4", 64, True, 63),
])  # fmt: skip
def test_norms_over_4_bits(kind: str, blocksize: int, nested: bool, K: int, dtype: torch.dtype, adapter: torch.dtype) -> None:
    """Decoded in the tile, and rounded to the dtype of the layer; by way of a dense W where rows are not whole blocks."""
    W = quantize(torch.randn(45, K), kind, blocksize, nested).to(DEVICE)
    check_norm(W, apart(4, K, dtype=adapter), apart(45, 4, dtype=adapter), 0.25, dtype)


def test_wide_ranks_and_empty_weights() -> None:
    check_norm(apart(20, 70, dtype=BF16), apart(80, 70, dtype=FP32), apart(20, 80, dtype=FP32), 2.0, BF16)
    for N, K, R in ((0, 5, 2), (5, 0, 2), (5, 4, 0)):
        check_norm(apart(N, K, dtype=FP16), apart(R, K, dtype=FP16), apart(N, R, dtype=FP16), 2.0, FP16)


@pytest.mark.parametrize(
    ("dtype", "of_m", "of_c"), [(BF16, FP32, BF16), (FP16, FP16, FP32), (FP32, BF16, None), (BF16, FP16, None)]
)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (17, 257), (50, 600)])
def test_the_scale(M: int, N: int, dtype: torch.dtype, of_m: torch.dtype, of_c: torch.dtype | None) -> None:
    """Rows with n = 0 have a gain of 0."""
    v, m, n = apart(M, N, dtype=dtype), apart(N, dtype=of_m), apart(N, dtype=FP32).abs_()
    n[N // 2] = 0
    c = None if of_c is None else apart(N, dtype=of_c)
    y = magnitude.scale(v, m, n, c)
    assert y.dtype == dtype
    exact = reference.forward(v.double(), m.double(), n.double(), None if c is None else c.double())
    judged({"y": y}, {"y": reference.forward(v, m, n, c).to(dtype)}, {"y": exact}, dtype)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (129, 40), (33, 300)])
def test_its_gradients(M: int, N: int, needs: tuple[bool, bool, bool]) -> None:
    """M is split; dv, dm and dc each only where it is needed, and without what they do not read."""
    need_v, need_m, _ = needs
    dy, v = strided(apart(M, N, dtype=FP16), "rows"), apart(M, N, dtype=FP16)
    m, n = apart(N, dtype=FP32), apart(N, dtype=FP32).abs_()
    n[N // 2] = 0
    dv, dm, dc = magnitude.scale_backward(dy, v if need_m else None, m, n if need_v or need_m else None, *needs)
    assert (dv is not None, dm is not None, dc is not None) == needs
    found = {name: t for name, t in (("dv", dv), ("dm", dm), ("dc", dc)) if t is not None}
    exact, plain = (
        dict(zip(("dv", "dm", "dc"), (*reference.backward(dy.to(t), v.to(t), m.to(t), n.to(t)), dy.to(t).sum(0)), strict=True))
        for t in (FP64, FP32)
    )
    for name, t in found.items():
        own = FP16 if name == "dv" else FP32
        assert t.dtype == own
        judged({name: t}, {name: plain[name].to(own)}, {name: exact[name]}, own)


@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP32), (FP32, FP32)])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (17, 70, 33, 5), (70, 24, 300, 12), (3, 600, 40, 80)])
def test_a_layer(sizes: tuple[int, int, int, int], dtype: torch.dtype, adapter: torch.dtype) -> None:
    M, K, N, R = sizes
    case = Case(M=M, K=K, N=N, R=R, p=0.3, dtype=dtype, adapter_dtype=adapter, dora=True, strided=True, device=DEVICE)
    check_contract(case.draw())


@pytest.mark.parametrize("needs", [("x",), ("m",), ("c",), ("A", "m"), ("B", "c"), ("x", "W", "A", "B", "c", "m")], ids="".join)
def test_only_what_is_wanted(needs: tuple[str, ...]) -> None:
    check_contract(Case(M=40, dora=True, dtype=FP16, needs=needs, device=DEVICE).draw())


@pytest.mark.parametrize("K", [128, 100])
def test_a_layer_over_4_bits(K: int) -> None:
    check_contract(Case(M=20, K=K, N=40, dtype=BF16, adapter_dtype=FP32, quant_type="nf4", dora=True, device=DEVICE).draw())


def test_a_transposed_weight() -> None:
    """As GPT-2's Conv1D keeps it."""
    problem = Case(M=20, K=72, N=40, dtype=FP16, dora=True, device=DEVICE).draw()
    check_contract(replace(problem, W=problem.W.T.contiguous().T))


def test_members_with_a_magnitude_and_without() -> None:
    layers = (Layer(33, 4, dora=True), Layer(10, None), Layer(9, 12, bias=False, dora=True), Layer(20, 80, dora=True))
    check_members(GroupCase(M=19, K=40, p=0.3, members=layers, dtype=FP16, device=DEVICE))


def test_the_norm_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """dora_norm takes the kernel, and float64 PyTorch."""
    called, kernel = [], magnitude.row_norm
    monkeypatch.setattr(magnitude, "row_norm", lambda *args: called.append(1) or kernel(*args))
    W, A, B = apart(20, 30, dtype=BF16), apart(4, 30, dtype=FP32), apart(20, 4, dtype=FP32)
    n = dora_norm(W, A, B, 2.0)
    assert called == [1]
    torch.testing.assert_close(n, reference.norm(W, A, B, 2.0))
    wide = [t.double() for t in (W, A, B)]
    torch.testing.assert_close(dora_norm(*wide, 2.0), reference.norm(*wide, 2.0))
    assert called == [1]


def test_reruns_give_the_same_bits() -> None:
    problem = Case(M=70, K=600, N=40, R=12, dtype=BF16, dora=True, device=DEVICE).draw()
    first, second = contract(problem), contract(problem)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_has_no_kernels() -> None:
    problem = Case(dora=True, adapter_dtype=FP32, dtype=FP16, device=DEVICE).draw()
    call = describe("linear", "triton", FP16, problem.x, (problem.member()._replace(magnitude=problem.m.double()),), None, ())
    with pytest.raises(RuntimeError, match="magnitude is float64"):
        choose(call)
    assert "rank above" in row_norm.refusal(problem.W, 65)


@pytest.mark.parametrize("broken", ["row_norm", "magnitude", "magnitude_backward"])
def test_where_a_kernel_does_not_compile_pytorch_computes(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "auto", forward and backward and the norm alone; a request by name raises."""

    def fails(*_: object) -> None:
        raise compilation.OutOfResources(300000, 166912, "shared memory")

    problem = Case(M=20, K=30, N=40, dora=True, dtype=FP16, device=DEVICE).draw()
    monkeypatch.setattr(compilation, "broken", {})
    monkeypatch.setattr(magnitude, broken, fails)
    with pytest.raises(compilation.OutOfResources):
        contract(problem)
    monkeypatch.setattr("accuracy.choose", lambda call: planning.plan_of("triton", call._replace(setting="auto"), *functions))
    functions = (linear.forward, linear.backward), (pytorch.forward, pytorch.backward)
    check_contract(problem)
    assert "shared memory" in next(iter(compilation.broken.values()))
    if broken == "row_norm":
        with use_backend("auto"), torch.no_grad():
            n = magnitude.norm(problem.W, problem.A, problem.B, 2.0, FP16)
            torch.testing.assert_close(n, reference.norm(problem.W, problem.A, problem.B, 2.0))
