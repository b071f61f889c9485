"""The weighted sum of adapters as one: ΔW = Σ wᵢ·(αᵢ / rᵢ)·Bᵢ·Aᵢ, exactly, as ranks add up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .factors import Factors
from .writing import Parts


def weighted_sum(files: Sequence[tuple[Parts, float]]) -> dict[str, dict[str, Factors]]:
    """By part and path; each layer has the sum of those files' that adapt it.

    In float32 or wider. Raises ValueError for DoRA, which is no sum, and for a module that files have in different shapes.
    """
    found: dict[str, dict[str, list[tuple[Factors, float]]]] = {}
    for parts, weight in files:
        for part, factors in parts.items():
            for path, each in factors.items():
                found.setdefault(part, {}).setdefault(path, []).append((each, weight))
    return {part: {path: _sum(path, terms) for path, terms in paths.items()} for part, paths in found.items()}


def _sum(path: str, terms: list[tuple[Factors, float]]) -> Factors:
    one = terms[0][0]
    for each, _ in terms:
        if each.magnitude is not None:
            raise ValueError(f"{each.key!r} has DoRA's magnitude beside, and its weight is no sum; merge it into a model")
        if each.A.shape[1:] != one.A.shape[1:] or each.B.shape[0] != one.B.shape[0] or each.B.dim() != one.B.dim():
            raise ValueError(
                f"{path}: {each.key!r} is {list(each.A.shape)} with {list(each.B.shape)} beside, and {one.key!r} "
                f"{list(one.A.shape)} with {list(one.B.shape)}: they were made for different models"
            )
    A = torch.cat([weight * each.alpha / each.r * _wide(each.A) for each, weight in terms])
    B = torch.cat([_wide(each.B) for each, _ in terms], 1)
    biases = [weight * each.alpha / each.r * _wide(each.bias) for each, weight in terms if each.bias is not None]
    return Factors(A, B, A.shape[0], None, torch.stack(biases).sum(0) if biases else None, one.key)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
