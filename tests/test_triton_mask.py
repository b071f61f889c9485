"""The Triton mask is dropout_mask, bit for bit."""

import pytest
import torch
from triton_interpreter import DEVICE

from lora_kernels.backends.triton.kernels import mask
from lora_kernels.backends.triton.kernels.grad_x import grad_x
from lora_kernels.backends.triton.kernels.project import project
from lora_kernels.mask import KeepRows, dropout_mask, threshold
from lora_kernels.values import Dropout

SEEDS = [0, 1, -1, 2**62 + 12345, -(2**63), 0x9E3779B97F4A7C15 - 2**64]


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor(seed, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("p", [1e-5, 0.05, 0.1, 0.5, 0.5 + 2**-16, 0.9, 1.0])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (3, 7), (17, 129), (33, 520)])
def test_every_p_and_shape(M: int, K: int, p: float) -> None:
    seed = seed_tensor(SEEDS[3])
    assert torch.equal(mask.mask_bits(M, K, p, seed), dropout_mask(M, K, p, seed))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed(seed: int) -> None:
    assert torch.equal(mask.mask_bits(9, 40, 0.3, seed_tensor(seed)), dropout_mask(9, 40, 0.3, seed_tensor(seed)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_kernels_that_use_it(dtype: torch.dtype) -> None:
    """With identity adapters F1 returns drop(x) and B2 undrop(g): their tiles, splits and strips see the same mask."""
    M, K, p, seed = 67, 64, 0.3, seed_tensor(SEEDS[3])
    keep, eye = dropout_mask(M, K, p, seed), torch.eye(K, dtype=dtype, device=DEVICE)
    x = torch.ones(M, K, dtype=dtype, device=DEVICE)
    assert torch.equal(project(x, (eye,), Dropout(p, seed))[0] != 0, keep)
    dx, (dA,) = grad_x(x, (x,), (eye,), Dropout(p, seed), dtype, need_x=True, need_As=(True,))
    assert torch.equal(dx != 0, keep)
    assert torch.equal((dA[0].double() * (1 - threshold(p) / 65536)).round(), keep.double().sum(0).round())


def test_wide_k_splits_see_the_same_mask() -> None:
    """One row of 1032 columns is split between four programs; column blocks continue across them."""
    M, K, p, seed = 1, 1032, 0.5, seed_tensor(7)
    x = torch.ones(M, K, device=DEVICE)
    pick = torch.zeros(8, K, device=DEVICE)
    columns = torch.tensor([0, 7, 8, 255, 256, 511, 1024, 1031], device=DEVICE)
    pick[torch.arange(8), columns] = 1
    assert torch.equal(project(x, (pick,), Dropout(p, seed))[0] != 0, dropout_mask(M, K, p, seed)[:, columns])


def test_rows_beyond_2_to_the_31() -> None:
    """Row counters are unsigned 32-bit words on both sides."""
    p, seed, start = 0.4, seed_tensor(11), 2**31 - 3
    ones = torch.ones(5, 24, device=DEVICE)
    kept = mask.drop(ones, p, seed, first_row=start, out=torch.empty_like(ones)) != 0
    assert torch.equal(kept, KeepRows(24, p, seed)(slice(start, start + 5)))


def test_p_below_half_a_lane_drops_nothing() -> None:
    assert not mask.drops(2**-18)
    assert mask.drops(2**-16)
