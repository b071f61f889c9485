"""Up to three members in one launch: what their kernels are compiled for, and their arguments."""

from typing import Any

import torch
from torch import Tensor

from ....values import Dropout
from ..tuning import padded_rank

MEMBERS = 3  # q, k, v are the most that share an input in the models of today
Kinds = tuple[tuple[int, torch.dtype], ...]
"""(rank, dtype of the adapters) of each member."""


def constants(kinds: Kinds, offsets: tuple[int, ...]) -> dict[str, int]:
    """R, OFFSET and BR of each member; of an absent one the least, so that all launches of fewer members are one kernel."""
    found: dict[str, int] = {}
    for i in range(MEMBERS):
        R, offset = (kinds[i][0], offsets[i]) if i < len(kinds) else (1, 0)
        found |= {f"R{i}": R, f"OFFSET{i}": offset, f"BR{i}": padded_rank(R)}
    return found


def most(dtype: torch.dtype, kinds: Kinds) -> tuple[torch.dtype, int]:
    """The dtype of adapters and the rank that decide a launch's tile: those that need most, beside activations of `dtype`."""
    adapter = next((adapter for _, adapter in kinds if adapter != dtype), dtype)
    return adapter, max([R for R, _ in kinds])


def in_turn(*tensors: Any) -> list[Tensor | None]:
    """The first of each list, the second of each, …, and None for the members that are not there."""
    found = [t for member in zip(*tensors, strict=True) for t in member]
    return found + [None] * (len(tensors) * MEMBERS - len(found))


def words(dropout: Dropout | None) -> tuple[float | None, Tensor | None, int]:
    """p, seed and offset."""
    return (None, None, 0) if dropout is None else dropout
