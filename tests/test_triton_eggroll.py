"""EGGROLL's kernels: their normal values are those of lora_kernels.normal to the bit; what is wrong with them is caught."""

import pytest
import torch
import triton
import triton.language as tl
from test_eggroll import FP32, SEED, broken, draw
from triton_interpreter import DEVICE

from lora_kernels import eggroll_gradient, use_backend
from lora_kernels.backends.triton.kernels import eggroll
from lora_kernels.normal import normals, table

normal_tile = eggroll.normal_tile


@triton.jit
def draw_kernel(seed, table, out, row, column, offset_low, offset_high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_row = tl.arange(0, ROWS)
    values = normal_tile(tl.load(seed), table, row + o_row, column, offset_low, offset_high, COLUMNS)
    tl.store(out + o_row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], values)


@pytest.mark.parametrize("offset", [0, 5, (1 << 31) + 7, (1 << 40) + 3, (1 << 64) - 1])
def test_the_same_bits_in_a_kernel(offset: int) -> None:
    seed, out = torch.tensor(SEED, device=DEVICE), torch.empty(16, 64, device=DEVICE)
    draw_kernel[(1,)](seed, table(DEVICE), out, 3, 24, *eggroll.words(offset), ROWS=16, COLUMNS=64)
    assert torch.equal(out, normals(slice(3, 19), 24 + 64, seed, offset)[:, 24:])


@triton.jit
def normal_of_the_first_row(seed, table, o_row, column, offset_low, offset_high, COLUMNS: tl.constexpr):
    return normal_tile(seed, table, o_row * 0, column, offset_low, offset_high, COLUMNS)


@triton.jit
def normal_without_a_sign(seed, table, o_row, column, offset_low, offset_high, COLUMNS: tl.constexpr):
    return tl.abs(normal_tile(seed, table, o_row, column, offset_low, offset_high, COLUMNS))


MISTAKES = {
    "normal_tile": [normal_of_the_first_row, normal_without_a_sign],
    "words": [lambda offset: (0, 0), lambda offset: (offset & 1, 0)],
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
@pytest.mark.parametrize(("name", "mistake"), [(name, m) for name, found in MISTAKES.items() for m in found])
def test_a_mistake_is_caught(name: str, mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, c = draw(12, 24, 40, FP32, DEVICE)
    f = torch.randn(4, device=DEVICE)

    def gradient() -> torch.Tensor:
        return eggroll_gradient(f, (24, 40), sigma=0.5, rank=3, seed=SEED, offset=2)

    with use_backend("torch"):
        expected = gradient()
    with use_backend("triton"):
        assert not broken(x, W, c, 4, 3, FP32)
        torch.testing.assert_close(gradient(), expected)
        monkeypatch.setattr(eggroll, name, mistake)
        assert broken(x, W, c, 4, 3, FP32)
        assert not torch.allclose(gradient(), expected, rtol=1e-3, atol=1e-3)
