"""Triton's interpreter computes bfloat16 as a GPU does, and 64-bit offsets reach where they should."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, contract
from triton_interpreter import DEVICE

from lora_kernels import use_backend

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


@pytest.mark.skipif(DEVICE.type == "cuda", reason="relies on untouched pages of a CPU's memory costing nothing")
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
