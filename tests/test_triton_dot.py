"""tiles.dot over every pair of dtypes: what its parts leave out, and what is not a number."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_interpreter import DEVICE

from lora_kernels.backends.triton.kernels import tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# |error| over Σ|a||b|: a float32 sum where one operand is an activation, a fraction of a 16-bit half unit between adapters
PAIRS = [(BF16, FP32, 2**-20), (FP16, FP32, 2**-20), (FP32, FP32, 2**-15), (BF16, FP16, 2**-20), (FP16, BF16, 2**-20),
         (FP32, BF16, 2**-15), (FP16, FP16, 2**-20), (BF16, BF16, 2**-20)]  # fmt: skip
SPREADS = [((0, 0), (0, 0)), ((-14, 12), (-60, 60)), ((10, 13), (-14, -4)), ((-20, -14), (0, 13))]
SIZE = 32


@triton.jit
def dot_kernel(a, b, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + tile, tiles.dot(tl.load(a + tile), tl.load(b + tile), None, PRECISION))


@triton.jit
def products_of_parts_without_the_last(a, b):
    a0, _ = tiles.cut(a)
    b0, b_rest = tiles.cut(b)
    return tl.dot(a0, b0, tl.dot(a0, b_rest.to(tl.bfloat16)))


def product(a: Tensor, b: Tensor) -> Tensor:
    out = torch.full((SIZE, SIZE), torch.nan, device=DEVICE)
    dot_kernel[(1,)](a, b, out, PRECISION="parts", SIZE=SIZE)
    return out.double()


def draw(dtype: torch.dtype, magnitudes: tuple[float, float]) -> Tensor:
    """A matrix whose elements' magnitudes are spread between these powers of two."""
    exponents = torch.empty(SIZE, SIZE).uniform_(*magnitudes)
    return (torch.randn(SIZE, SIZE) * torch.exp2(exponents)).to(dtype).to(DEVICE)


def worst(a: Tensor, b: Tensor) -> float:
    """The largest error over Σ|a||b|."""
    error = (product(a, b) - a.double() @ b.double()).abs()
    return (error / (a.double().abs() @ b.double().abs())).max().item()


@pytest.mark.parametrize(("a_dtype", "b_dtype", "bound"), PAIRS)
@pytest.mark.parametrize(("of_a", "of_b"), SPREADS)
def test_what_is_left_out(a_dtype, b_dtype, bound, of_a, of_b) -> None:
    torch.manual_seed(0)
    if b_dtype == FP16:
        of_b = of_a
    assert worst(draw(a_dtype, of_a), draw(b_dtype, of_b)) < bound


@pytest.mark.parametrize(("a_dtype", "b_dtype", "bound"), [pair for pair in PAIRS if FP32 in pair[:2]])
def test_what_is_not_finite_stays_so(a_dtype, b_dtype, bound) -> None:
    """NaN gives NaN, inf gives inf or NaN, in the results that they reach and in no other."""
    for value in (torch.nan, torch.inf, -torch.inf):
        a, b = draw(a_dtype, (0, 0)), draw(b_dtype, (0, 0))
        a[3, 5] = value
        assert not product(a, b)[3].isfinite().any()
        assert product(a, b)[torch.arange(SIZE) != 3].isfinite().all()
        b[7, 2] = value
        assert not product(draw(a_dtype, (0, 0)), b)[:, 2].isfinite().any()
    a = torch.full_like(a, torch.nan)
    assert product(a, b).isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
@pytest.mark.parametrize(("a_dtype", "b_dtype", "bound"), [pair for pair in PAIRS if FP32 in pair[:2]])
def test_a_part_too_few_is_caught(a_dtype, b_dtype, bound, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "products_of_parts", products_of_parts_without_the_last)
    torch.manual_seed(0)
    assert worst(draw(a_dtype, (0, 0)), draw(b_dtype, (0, 0))) > bound
