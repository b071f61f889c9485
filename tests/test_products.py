"""The vendors' products in place: what they add, and with which error."""

import pytest
import torch

from lora_kernels.backends.products import accumulate, add_product


@pytest.mark.parametrize(("M", "N"), [(1, 64), (2, 64), (3, 64), (1, 2048), (64, 1), (64, 2), (64, 4), (64, 8), (64, 9)])
@pytest.mark.parametrize("K", [512, 4096])
def test_accumulate_adds_the_product_once(M, N, K):
    """Summed into `out` term by term, the rounding error would be that of K additions to a large number."""
    torch.manual_seed(0)
    found, once = [], []
    for _ in range(8):
        a, b, out = torch.randn(M, K), torch.randn(K, N), torch.randn(M, N) * K**0.5
        exact = out.double() + a.double() @ b.double()
        once.append((out + a @ b).double() - exact)
        found.append(accumulate(out, a, b).double() - exact)
    assert torch.stack(found).norm() <= 1.2 * torch.stack(once).norm()


def test_a_product_of_16_bits_is_added_in_float32_tile_by_tile():
    a, b, out = torch.randn(4100, 5).bfloat16(), torch.randn(5, 1030).bfloat16(), torch.randn(4100, 1030)
    want = out + a.float() @ b.float()
    torch.testing.assert_close(add_product(out, a, b), want)
