"""eggroll_linear and eggroll_gradient: a population of low-rank perturbations of a layer, and what their fitness says."""

import math

import torch
from torch import Tensor

from .. import plan
from ..dtypes import without_autocast
from ..mask import as_seed
from ..nf4 import NF4Weight
from ..operation.definition import compute_dtype, in_dtype, rows_of
from ..values import LoRAWeights
from .checks import check_member


@torch.no_grad()
def eggroll_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    *,
    population: int,
    sigma: float,
    rank: int = 1,
    seed: int | Tensor,
    offset: int = 0,
) -> Tensor:
    """y_i = x_i·Wᵀ + (σ_i/√r)·(x_i·A_jᵀ)·B_jᵀ + c for the rows x_i of each member i of a population (EGGROLL), no gradient.

    Shapes: x[..., K] of P·M rows, the first M of member 0, the next of member 1, …; weight W[N, K] (an NF4Weight in 4 bits),
    bias c[N] -> y[..., N]. Members 2j and 2j + 1 are a pair: σ_i is sigma and -sigma, and A_j[r, K], B_j[N, r] are standard
    normal values drawn from (seed, j), never stored: the same bits on every device (`lora_kernels.normal`).
    offset: below 2^63, gives independent factors from one seed, as for each layer of a model.
    Dtypes: x, weight and bias share one, which is y's; sums are in float32 or wider.
    Raises TypeError or ValueError for arguments that do not fit.
    """
    check_population(population, sigma, rank, offset)
    member = LoRAWeights(weight, None, None, bias)
    check_member(x, member)
    dtype, count = compute_dtype(x, (member,)), math.prod(x.shape[:-1])
    if count % population:
        raise ValueError(f"x: got {count} rows, expected a multiple of population={population}, as many of each member")
    seed, rows, (member,) = as_seed(seed, x.device), rows_of(x, dtype), in_dtype((member,), dtype)
    backend = next(m for m in plan.modules("eggroll") if m.why_not(rows) is None)
    with without_autocast(x.device):
        y = backend.forward(rows, member.weight, member.bias, population, float(sigma), rank, seed, offset)
    return y.view(*x.shape[:-1], y.shape[1])


@torch.no_grad()
def eggroll_gradient(
    fitness: Tensor, shape: tuple[int, int], *, sigma: float, rank: int = 1, seed: int | Tensor, offset: int = 0
) -> Tensor:
    """dW = 1/(P·σ·√r) Σ_j (f_2j - f_2j+1)·B_j·A_j, the estimate of the gradient of the mean fitness by W.

    Shapes: fitness f[P] of the members that `eggroll_linear` computed with the same sigma, rank, seed and offset; shape (N, K)
    -> dW[N, K] on fitness' device, in float32 (float64 where fitness is). The factors are drawn anew, in chunks of pairs.
    Fitness is to grow: an optimizer, which descends, is given -dW.
    Raises TypeError or ValueError for arguments that do not fit.
    """
    if not isinstance(fitness, Tensor) or not fitness.is_floating_point():
        got = fitness.dtype if isinstance(fitness, Tensor) else type(fitness).__name__
        raise TypeError(f"fitness: got {got}, expected a tensor of floats; use torch.tensor(…).float()")
    if fitness.ndim != 1:
        raise ValueError(f"fitness: got shape {tuple(fitness.shape)}, expected [P], a number for each member")
    check_population(len(fitness), sigma, rank, offset)
    if len(shape) != 2 or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"shape: got {shape}, expected (N, K) of the weight")
    f, seed = fitness.to(torch.promote_types(fitness.dtype, torch.float32)), as_seed(seed, fitness.device)
    backend = next(m for m in plan.modules("eggroll") if m.why_not(f) is None)
    with without_autocast(f.device):
        return backend.gradient(f, *shape, float(sigma), rank, seed, offset)


def check_population(population: int, sigma: float, rank: int, offset: int) -> None:
    """Raise TypeError or ValueError unless these describe a population of pairs."""
    for name, value, least in (("population", population, 2), ("rank", rank, 1), ("offset", offset, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    if population % 2:
        raise ValueError(f"population: got {population}, expected an even number: members are pairs of opposite perturbations")
    if population // 2 * rank >= 1 << 31:
        raise ValueError(f"population, rank: got {population}, {rank}, expected fewer than 2^31 rows of factors")
    if offset >= 1 << 63:
        raise ValueError(f"offset: got {offset}, expected it below 2^63")
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        raise TypeError(f"sigma: got {type(sigma).__name__}, expected a float")
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma: got {sigma}, expected a positive number")
