"""The tensors of one module in a file, as LoRA has them: ΔW = (α / r)·B·A, A[R, K] or [R, C, k, k], B[N, R] or [N, R, 1, 1]."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter_checks import why_not_finite
from .keys import ALPHA, BIAS, DOWN, MAGNITUDE, MID, UP, Key, parse


@dataclass(frozen=True)
class Factors:
    """One module's: `key` is a file's key of A, for errors, and `end` how the keys of A and B end there."""

    A: Tensor
    B: Tensor
    alpha: float  # r where a file has none
    magnitude: Tensor | None = None  # DoRA's m[N]
    bias: Tensor | None = None  # [N], scaled by α / r as B is
    key: str = ""
    ends: tuple[str, str] = ("", "")
    own_alpha: bool = False  # whether the file has it

    @property
    def r(self) -> int:
        return self.A.shape[0]

    def rows(self, index: Tensor) -> "Factors":
        """Of these rows of W: A is shared, and the rest has a number for each row."""
        magnitude, bias = (None if each is None else each[index] for each in (self.magnitude, self.bias))
        return replace(self, B=self.B[index], magnitude=magnitude, bias=bias)


class Module(NamedTuple):
    """Where a file says that factors belong."""

    format: str
    part: str
    name: str
    base: str


def modules_of(tensors: Mapping[str, Tensor]) -> dict[Module, Factors]:
    """A file's tensors by module. Raises ValueError that names a key for what is missing, twice there or no LoRA."""
    found: dict[Module, dict[str, str]] = {}
    for key in tensors:
        parsed: Key = parse(key)
        kinds = found.setdefault(Module(*parsed[:4]), {})
        if parsed.kind in kinds:
            raise ValueError(f"{key!r} says the same as {kinds[parsed.kind]!r}: expected one of the two")
        kinds[parsed.kind] = key
    if not found:
        raise ValueError("no tensors, expected LoRA's")
    return {module: _factors(module.base, kinds, tensors) for module, kinds in found.items()}


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file's tensors, once their shapes are known to be right. Raises ValueError that names it and a key for NaN."""
    for key, tensor in tensors.items():
        if bad := why_not_finite(key, tensor):
            raise ValueError(f"{path}: {bad[0]}")


def _factors(base: str, kinds: dict[str, str], tensors: Mapping[str, Tensor]) -> Factors:
    for kind in (DOWN, UP):
        if kind not in kinds:
            raise ValueError(f"{base!r} has {sorted(kinds.values())}, and no {kind} matrix beside: it is missing")
    down, up = tensors[kinds[DOWN]], tensors[kinds[UP]]
    if down.dim() not in (2, 4) or not down.numel():
        raise ValueError(f"{kinds[DOWN]!r} has shape {tuple(down.shape)}, expected [r, in] or [r, in, k, k]")
    r = down.shape[0]
    if up.dim() not in (2, 4) or not up.numel() or up.shape[1] != r or up[0, 0].numel() != 1:
        raise ValueError(f"{kinds[UP]!r} has shape {tuple(up.shape)}, expected [out, {r}] or [out, {r}, 1, 1]")
    A = down if MID not in kinds else _fold(kinds, tensors[kinds[MID]], down)
    N, alpha = up.shape[0], r if ALPHA not in kinds else _alpha(kinds[ALPHA], tensors[kinds[ALPHA]])
    magnitude = _of_rows(kinds, MAGNITUDE, tensors, N, "DoRA's scales of W's rows")
    bias = _of_rows(kinds, BIAS, tensors, N, "a bias")
    ends = kinds[DOWN].removeprefix(base), kinds[UP].removeprefix(base)
    return Factors(A, up, alpha, magnitude, bias, kinds[DOWN], ends, ALPHA in kinds)


def _fold(kinds: dict[str, str], mid: Tensor, down: Tensor) -> Tensor:
    """A[a, c, i, j] = Σ_b mid[a, b, i, j]·down[b, c]: LyCORIS' Tucker form of a convolution, rounded once."""
    r = down.shape[0]
    if mid.dim() != 4 or mid.shape[:2] != (r, r) or down[0, 0].numel() != 1:
        raise ValueError(
            f"{kinds[MID]!r} has shape {tuple(mid.shape)} over {kinds[DOWN]!r} of {tuple(down.shape)}, expected "
            f"[{r}, {r}, k, k] over [{r}, in, 1, 1]"
        )
    folded = torch.einsum("abij,bc->acij", mid.double(), down.double().flatten(1))
    return folded.to(torch.promote_types(torch.promote_types(mid.dtype, down.dtype), torch.float32))


def _alpha(key: str, tensor: Tensor) -> float:
    alpha = float(tensor) if tensor.numel() == 1 else 0.0
    if not 0 < alpha < math.inf:
        raise ValueError(f"{key!r} holds {tensor.flatten()[:4].tolist()}, expected one finite number above 0")
    return alpha


def _of_rows(kinds: dict[str, str], kind: str, tensors: Mapping[str, Tensor], N: int, what: str) -> Tensor | None:
    """A tensor with a number for each row of W, [N], or kohya's [N, 1] and [N, 1, 1, 1]."""
    if kind not in kinds:
        return None
    tensor = tensors[kinds[kind]]
    if not tensor.dim() or tensor.shape[0] != N or tensor.numel() != N:
        by_columns = "; LyCORIS' scales of columns (wd_on_output=False) have no counterpart here" * (kind == MAGNITUDE)
        raise ValueError(f"{kinds[kind]!r} has shape {tuple(tensor.shape)}, expected {what}, [{N}] or [{N}, 1, …]{by_columns}")
    return tensor.flatten()
