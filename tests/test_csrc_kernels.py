"""The CUDA kernels' values: bit for bit the reference's, which tests/test_nf4.py compares with bitsandbytes.

Without a GPU their source runs in the emulator; with LORA_KERNELS_TEST_DEVICE=cuda the built extension runs.
"""

from types import ModuleType

import pytest
import torch
from accuracy import violations
from csrc_emulator import dequantised, quantised
from properties import HealthCheck, given, settings, st
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.functional.nf4 import quantize
from lora_kernels.nf4 import NF4Weight
from lora_kernels.nf4 import tables as nf4_tables
from lora_kernels.nf4.weight import BLOCKSIZES
from lora_kernels.reference.nf4 import dequantize

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CANARY = 7.0


def hostile(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of many magnitudes: zeros of both signs, denormals, ties, blocks of zeros, the largest of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 6 - 3)
    kind = torch.randint(0, 40, (n,), generator=generator)
    x[kind == 0], x[kind == 1], x[kind == 2] = 0.0, -0.0, 1e-42
    x[64:192] = 0.0
    x[256:320] *= 1e-40
    x[320:384] = nf4_tables.thresholds("nf4", torch.device("cpu"))[0].repeat(5)[: len(x[320:384])]
    x[320:321] = 1.0
    if n > 400:
        x[400] = torch.finfo(dtype).max
    return x.to(dtype)


def weight(shape: tuple[int, ...], dtype: torch.dtype, blocksize: int, nested: bool, kind: str, device: torch.device):
    values = hostile(torch.Size(shape).numel(), dtype).view(shape)
    values[values.abs() > 1e30] = 3.0  # nested, the largest float32 would be all that is left of its neighbours
    return quantize(values, kind, blocksize, nested).to(device)


def exact(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """W by PyTorch operations on the CPU, on w's device."""
    return dequantize(w.to("cpu"), dtype or w.dtype).to(w.device)


def bits(t: Tensor) -> Tensor:
    return t.cpu().contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


# ---- dequantise ----


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 64), (3, 7), (1, 1), (5, 40), (33, 129), (1, 4103), (130, 264)])
def test_dequantise_is_exact(
    cuda: ModuleType, shape: tuple[int, int], kind: str, dtype: torch.dtype, nested: bool, device: torch.device
) -> None:
    w = weight(shape, FP32, 64, nested, kind, device)
    want = bits(exact(w, dtype))
    assert torch.equal(bits(dequantised(w, dtype)), want)
    for extra in (8, 3):  # aligned rows, and rows that are not
        memory = torch.full((shape[0], shape[1] + extra), CANARY, dtype=dtype, device=device)
        out = memory[:, : shape[1]]
        assert dequantised(w, out=out) is out
        assert torch.equal(bits(out), want)
        assert (memory[:, shape[1] :] == CANARY).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantise_every_blocksize(cuda: ModuleType, blocksize: int, nested: bool, device: torch.device) -> None:
    w = weight((37, 272), BF16, blocksize, nested, "nf4", device)  # blocks cross rows
    assert torch.equal(bits(dequantised(w)), bits(exact(w)))


def test_dequantise_from_and_to_any_address(cuda: ModuleType, device: torch.device) -> None:
    """Codes that start at an odd byte, an output that starts in the middle of 16 bytes, more words than one round of a grid."""
    w = weight((24, 1024), BF16, 64, True, "nf4", device)
    want = bits(exact(w))
    odd = torch.cat([w.codes[:1], w.codes])[1:]
    assert torch.equal(bits(dequantised(w.with_tensors(codes=odd))), want)
    memory = torch.full((1 + w.numel() + 1,), CANARY, dtype=BF16, device=device)
    dequantised(w, out=memory[1:-1].view(24, 1024))
    assert torch.equal(bits(memory[1:-1].view(24, 1024)), want)
    assert memory[0] == memory[-1] == CANARY
    big = weight((64, 1024), BF16, 64, True, "nf4", device)
    assert torch.equal(bits(dequantised(big)), bits(exact(big)))


def test_dequantise_to_other_layouts(cuda: ModuleType, device: torch.device) -> None:
    w = weight((12, 40), FP32, 64, True, "nf4", device)
    want = exact(w)
    assert torch.equal(dequantised(w, out=torch.empty(40, 12, device=device).T), want)
    assert torch.equal(dequantised(w, torch.float64), want.double())
    empty = weight((0, 40), FP32, 64, False, "nf4", device)
    assert dequantised(empty).shape == (0, 40)


# ---- quantise ----


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1025, 20_001])
def test_quantise_is_exact(cuda: ModuleType, n: int, kind: str, dtype: torch.dtype, nested: bool, device: torch.device) -> None:
    values = hostile(n, dtype, seed=n)
    if nested:
        values[values.abs() > 1e30] = 3.0
    same(quantised(values.to(device), kind, 64, nested), quantize(values, kind, 64, nested))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantise_every_blocksize(cuda: ModuleType, blocksize: int, device: torch.device) -> None:
    values = hostile(9_999, BF16).view(99, 101)
    values[values.abs() > 1e30] = 3.0
    same(quantised(values.to(device), "nf4", blocksize, True), quantize(values, "nf4", blocksize, True))


@pytest.mark.parametrize("block", [0, 31, 223, 255])
def test_the_largest_absmax_is_found_in_every_warp(cuda: ModuleType, block: int, device: torch.device) -> None:
    values = torch.linspace(-1, 1, 256 * 32).view(256, 32)
    values[block] *= 10
    same(quantised(values.to(device), blocksize=32), quantize(values, "nf4", 32, True))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    blocksize=st.sampled_from(BLOCKSIZES),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([BF16, FP16, FP32]),
    nested=st.booleans(),
    extra=st.sampled_from([0, 1, 8]),
)
def test_random_shapes(
    cuda: ModuleType, device: torch.device, shape: tuple[int, int], blocksize: int, kind: str, dtype: torch.dtype, nested: bool,
    extra: int,
) -> None:  # fmt: skip
    """There and back, over rows that lie apart."""
    values = hostile(shape[0] * shape[1], dtype, seed=blocksize).view(shape)
    values[values.abs() > 1e30] = 3.0
    want = quantize(values, kind, blocksize, nested)
    same(quantised(values.to(device), kind, blocksize, nested), want)
    memory = torch.full((shape[0], shape[1] + extra), CANARY, dtype=dtype, device=device)
    out = dequantised(want.to(device), out=memory[:, : shape[1]])
    assert torch.equal(bits(out), bits(dequantize(want, dtype)))
    assert (memory[:, shape[1] :] == CANARY).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantise_names_the_first_bad_value(cuda: ModuleType, bad: float, device: torch.device) -> None:
    values = torch.randn(40, 100, device=device)
    values[31, 5] = values[7, 99] = values[39, 0] = bad
    with pytest.raises(ValueError, match=r"at \(7, 99\), expected finite"):
        quantised(values)


def same(got: NF4Weight, want: NF4Weight) -> None:
    assert got.tensors().keys() == want.tensors().keys()
    for name, tensor in want.tensors().items():
        mine = got.tensors()[name].cpu()
        assert mine.dtype == tensor.dtype, name
        assert torch.equal(
            mine.view(torch.uint8) if mine.ndim else mine, tensor.view(torch.uint8) if tensor.ndim else tensor
        ), name
    got.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_the_bytes_are_bitsandbytes_own(cuda, kind: str, dtype: torch.dtype, blocksize: int, device: torch.device) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(37, 8 * blocksize // 4).mul_(torch.logspace(-3, 3, 37)[:, None]).to(dtype)
    for nested in (False, True):
        codes, state = functional.quantize_4bit(values, blocksize=blocksize, quant_type=kind, compress_statistics=nested)
        w = quantised(values.to(device), kind, blocksize, nested)
        assert torch.equal(w.codes.cpu(), codes.flatten())
        assert torch.equal(w.absmax.cpu(), state.absmax)
        if nested:
            assert torch.equal(w.nested_absmax.cpu(), state.state2.absmax)
            assert torch.equal(w.nested_offset.cpu(), state.offset)
        else:  # 0.0 and -0.0 are equal here: bitsandbytes has either, by the number of columns
            assert torch.equal(dequantised(w).cpu(), functional.dequantize_4bit(codes, state))


# ---- the product for few tokens ----


class Product:
    """x[M, K], W[N, K] in 4 bits, h[M, R], B[N, R], c[N]."""

    def __init__(
        self, M: int, K: int, N: int, R: int, device: torch.device, dtype: torch.dtype = BF16, adapter: torch.dtype = BF16,
        blocksize: int = 64, nested: bool = True, kind: str = "nf4",
    ):  # fmt: skip
        torch.manual_seed(M * K + N)
        self.x = torch.randn(M, K, device=device).to(dtype)
        self.W = quantize(torch.randn(N, K) * K**-0.5, kind, blocksize, nested).to(device)
        self.h, self.B = torch.randn(M, R, device=device).to(adapter), torch.randn(N, R, device=device).to(adapter)
        self.c = torch.randn(N, device=device).to(dtype)

    def plain(self, dtype: torch.dtype | None = None) -> Tensor:
        W = exact(self.W, self.x.dtype)
        x, W, c, h, B = (t.to(dtype or t.dtype) for t in (self.x, W, self.c, self.h, self.B))
        return F.linear(x, W, c) + (1.7 * (h @ B.T)).to(x.dtype)

    def check(self, got: Tensor) -> None:
        plain, truth = self.plain(), self.plain(torch.float64)
        half_unit = truth * (1 + torch.finfo(got.dtype).eps / 2)
        plain = max(plain.double(), half_unit, key=lambda y: (y - truth).norm())  # of a few elements, PyTorch's error is luck
        assert got.dtype == self.x.dtype
        assert not violations({"y": got}, {"y": plain}, {"y": truth}, got.dtype)


@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize(("K", "N"), [(64, 16), (16, 1), (48, 33), (608, 20), (4672, 17)])  # 4672: three rounds of 2048 codes
def test_skinny_ragged_sizes(cuda: ModuleType, M: int, K: int, N: int, device: torch.device) -> None:
    case = Product(M, K, N, 4, device, nested=bool(N % 2))
    assert cuda.skinny_refusal(case.x, case.W, 4) is None
    case.check(cuda.skinny(case.x, case.W, case.h, case.B, 1.7, case.c))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("adapter", [BF16, FP16, FP32])
def test_skinny_every_dtype_and_blocksize(
    cuda: ModuleType, adapter: torch.dtype, dtype: torch.dtype, blocksize: int, kind: str, device: torch.device
) -> None:
    case = Product(3, 544, 24, 12, device, dtype, adapter, blocksize, blocksize != 128, kind)
    case.check(cuda.skinny(case.x, case.W, case.h, case.B, 1.7, case.c))


def test_skinny_sees_exactly_the_dequantised_weight(cuda: ModuleType, device: torch.device) -> None:
    """With rows of the identity as x the products are the weights themselves: every lane, byte and block, bit for bit."""
    K, N = 320, 40
    for dtype in (BF16, FP16):
        case = Product(16, K, N, 1, device, dtype)
        want = exact(case.W, dtype)
        for first in range(0, K, 16):
            x = torch.zeros(16, K, dtype=dtype, device=device)
            x[range(16), range(first, first + 16)] = 1
            got = cuda.skinny(x, case.W, case.h * 0, case.B, 1.0, None)
            assert torch.equal(got, want[:, first : first + 16].T), first


def test_skinny_scaling_in_a_tensor_views_and_reruns(cuda: ModuleType, device: torch.device) -> None:
    case = Product(5, 192, 24, 8, device)
    want = cuda.skinny(case.x, case.W, case.h, case.B, 1.75, case.c)
    for s in (torch.tensor(1.75, device=device), torch.tensor(1.75, device=device, dtype=torch.float64)):
        assert torch.equal(cuda.skinny(case.x, case.W, case.h, case.B, s, case.c), want)
    wide = torch.cat([case.x, case.x], 1)
    assert torch.equal(cuda.skinny(wide[:, 192:], case.W, case.h, case.B, 1.75, case.c), want)
    case.check(cuda.skinny(case.x, case.W, case.h, case.B, 1.7, case.c))
    no_bias = cuda.skinny(case.x, case.W, case.h * 0, case.B, 1.0, None)
    assert torch.equal(no_bias, cuda.skinny(case.x, case.W, case.h, case.B, 0.0, None))


def test_skinny_does_not_mix_tokens(cuda: ModuleType, device: torch.device) -> None:
    """inf and NaN in one token stay there, also where the last chunk is cut off."""
    case = Product(11, 80, 24, 4, device)
    want = cuda.skinny(case.x, case.W, case.h, case.B, 1.7, case.c)
    case.x[4] = float("inf")
    case.x[9, 0] = float("nan")
    got = cuda.skinny(case.x, case.W, case.h, case.B, 1.7, case.c)
    others = [m for m in range(11) if m not in (4, 9)]
    assert torch.equal(got[others], want[others])
    assert not got[[4, 9]].isfinite().any()
