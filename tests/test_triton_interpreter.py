"""Triton's interpreter computes bfloat16 as a GPU does, and 64-bit offsets reach where they should."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, contract
from triton_interpreter import DEVICE

from lora_kernels import Segments, lora_grouped_linear, use_backend
from lora_kernels.backends.triton.kernels import mask, row_norm

BF16 = torch.bfloat16


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@triton.jit
def round_kernel(v, out, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    tl.store(out + o, tl.load(v + o).to(tl.bfloat16))


def test_a_bfloat16_dot_multiplies_numbers() -> None:
    a, b = torch.randn(2, 16, 16, device=DEVICE).to(BF16)
    out = torch.empty(16, 16, device=DEVICE)
    dot_kernel[(1,)](a, b, out, SIZE=16)
    assert torch.allclose(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    special = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, torch.inf, -torch.inf, 1e-40, torch.nan])
    v = torch.cat([special, torch.randn(119)]).to(DEVICE)
    out = torch.empty(128, dtype=BF16, device=DEVICE)
    round_kernel[(1,)](v, out, SIZE=128)
    assert torch.equal(out.nan_to_num(7.0), v.to(BF16).nan_to_num(7.0))


cpu_alone = pytest.mark.skipif(DEVICE.type == "cuda", reason="relies on untouched pages of a CPU's memory costing nothing")


@cpu_alone
def test_rows_further_apart_than_2_to_the_31_elements() -> None:
    """x and dy whose third row starts 2^32 elements behind the first (8 GB of address space, a few pages of memory)."""
    problem = Case(M=3, K=40, N=40, R=8, p=0.3, dtype=torch.float16).draw()
    far = torch.empty(2**32 + 64, dtype=torch.float16).as_strided((3, 40), (2**31, 1))
    with use_backend("triton"):
        want = contract(problem)
        for name in ("x", "dy"):
            moved = far.copy_(getattr(problem, name).detach())
            got = contract(replace(problem, **{name: moved.requires_grad_() if name == "x" else moved.detach()}))
            far = far.detach()
            assert all(torch.equal(tensor, want[result]) for result, tensor in got.items())


def in_thirds(t: torch.Tensor) -> torch.Tensor:
    """t[3, …] in parts 2^30 elements apart, a stride of 32 bits: the third is 2^31 elements behind the first, and as many that
    are zeros lie before it, where a product of 32 bits would end.
    """
    memory = torch.empty(2**32 + t[0].numel(), dtype=t.dtype)
    return memory.as_strided(t.shape, (2**30, *t.stride()[1:]), 2**31).copy_(t)


@cpu_alone
def test_parts_whose_distance_has_32_bits_and_their_product_more() -> None:
    """Rows of each kernel's matrices, and segments' weights, where they may lie apart."""
    x, W, A, B = (torch.randn(size).half() for size in ((3, 40), (3, 8, 40), (3, 4, 40), (3, 8, 4)))
    seed, rows = torch.tensor(5), Segments.from_ids(torch.arange(3), 3)
    kept = mask.drop(x, 0.3, seed, out=torch.empty_like(x))
    assert torch.equal(mask.drop(in_thirds(x), 0.3, seed, out=in_thirds(torch.zeros(3, 40).half())), kept)
    norms = row_norm.row_norm(x, A[0], B[0, :3].clone(), 2.0, x.dtype)
    assert torch.equal(row_norm.row_norm(in_thirds(x), A[0], B[0, :3].clone(), 2.0, x.dtype), norms)
    with use_backend("triton"):
        y = lora_grouped_linear(x, W, A, B, rows)
        assert torch.equal(lora_grouped_linear(in_thirds(x), W, A, B, rows), y)
        assert torch.equal(lora_grouped_linear(x, in_thirds(W), A, B, rows), y)
