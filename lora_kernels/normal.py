"""normal(seed, row, column): standard normal values as a pure function, the same bits on every device and for any tiling.

A lane of mask.py's Philox blocks is one of 65,536 equally likely numbers l; its value is the normal distribution's quantile at
(l + 1/2) / 65536, times the factor that makes their variance 1, in float32, by a table: no device's logarithm or cosine decides
a bit. The values are symmetric; the largest is 4.33, and the fourth moment 2.999 in place of 3.
"""

import functools
from statistics import NormalDist

import torch
from torch import Tensor

from .mask import LANE_RANGE, lanes

HALF = LANE_RANGE // 2


def normals(rows: slice, K: int, seed: Tensor, offset: int = 0) -> Tensor:
    """normal(seed, row, column) of these rows and K columns: float32[rows, K]. `offset`: independent values of one seed."""
    return table(seed.device)[lanes(rows, K, seed, offset).long() + HALF]


@functools.cache
def table(device: torch.device) -> Tensor:
    """float32[65536]: the value of each lane."""
    quantile = NormalDist().inv_cdf
    with torch.inference_mode(False):
        upper = torch.tensor([quantile((HALF + j + 0.5) / LANE_RANGE) for j in range(HALF)], dtype=torch.float64)
        upper = (upper / upper.square().mean().sqrt()).float()
        return torch.cat([-upper.flip(0), upper]).to(device)
