"""lora_linear, and what the operation "linear" checks, returns and saves."""

import math

import torch
from torch import Tensor

from ..mask import check_p
from ..nf4 import NF4Weight
from ..operation import Members, Operation, call, register
from ..plan import BackendReport, describe, report, use_backend
from ..values import Dropout, LoRAWeights, Needs
from .checks import check_member


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c, with gradients for x, A, B, c, and W where it is trained too (Hu et al. 2021, §4.1).

    Shapes: x[..., K], weight W[N, K], lora_A[R, K], lora_B[N, R], bias c[N] -> y[..., N].
    Dtypes: bfloat16, float16, float32 or float64. x, weight and bias share one, which is also y's; the adapters share one,
    which may be another (float32 adapters over a 16-bit base are computed in float32). Under torch.autocast, x, weight and
    bias of any dtype are read as autocast's.
    A 4-bit weight (NF4Weight, frozen) is read as x's dtype, in both directions, and bias with it; adapters as above (QLoRA,
    Dettmers et al. 2023).
    scaling: s = alpha / r, a float or a 0-d tensor, which is read on the device.
    dropout_p: applies whenever it is above 0; pass 0 in evaluation. The mask is `dropout_mask(M, K, dropout_p, seed)`.
    seed: None draws it from torch's generator of x's device.

    Saves x itself, h = drop(x)·Aᵀ [M, R] and the seed for the backward pass, each only if a wanted gradient reads it.
    Raises TypeError or ValueError for arguments that do not fit, and RuntimeError on a second derivative.
    """
    member = LoRAWeights(weight, lora_A, lora_B, bias, scaling)
    (y,) = call(LINEAR, x, (member,), Dropout(dropout_p, seed) if dropout_p else None)  # type: ignore[arg-type]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def backend_report(
    x: Tensor, weight: Tensor | NF4Weight | None = None, lora_A: Tensor | None = None, lora_B: Tensor | None = None
) -> BackendReport:
    """Why each backend is or is not used for a call with these tensors, under the current `use_backend` setting."""
    member = LoRAWeights(weight, lora_A, lora_B)  # type: ignore[arg-type]
    return report(describe("linear", use_backend.current, x.dtype, x.reshape(-1, x.shape[-1]), (member,), None, ()))


# ---- the operation ----


def check(x: Tensor, members: Members, dropout: Dropout | None) -> None:
    """Raise TypeError or ValueError for arguments that do not fit."""
    for member in members:
        check_member(x, member)
    if dropout is not None:
        check_p(dropout.p)


def shapes(x: Tensor, members: Members) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """([M, N] of every y, [M, R] of every h)."""
    M = math.prod(x.shape[:-1])  # Size.numel() would fix a symbolic size, and every M be a graph of its own
    return [(M, m.weight.shape[0]) for m in members], [(M, m.lora_A.shape[0]) for m in members]


def kept(x: Tensor, members: Members, hs: tuple[Tensor, ...], dropout: Dropout | None, needs: Needs) -> tuple:
    """(x, members, hs, dropout) without what no wanted gradient reads: dx reads W, A and B, dA x and B, dB h, dW x."""
    pruned = tuple(
        member._replace(
            weight=member.weight if needs.x else None,  # type: ignore[arg-type]
            lora_A=member.lora_A if needs.x else None,  # type: ignore[arg-type]
            lora_B=member.lora_B if needs.x or "lora_A" in names else None,  # type: ignore[arg-type]
            bias=None,
        )
        for member, names in zip(members, needs.members, strict=True)
    )
    return (
        x if needs.any("lora_A", "weight") else None,
        pruned,
        tuple(h if "lora_B" in names else None for h, names in zip(hs, needs.members, strict=True)),
        dropout if needs.x or needs.any("lora_A") else None,
    )


def gradient_shapes(
    dys: tuple[Tensor | None, ...], x: Tensor | None, members: Members, hs: tuple[Tensor | None, ...], needs: Needs
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each wanted gradient: dx, then the members'; dc is in float32 or wider."""
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    first = next(dy for dy in dys if dy is not None)
    if needs.x:
        found.append(((first.shape[0], members[0].weight.shape[1]), first.dtype))
    for dy, member, h, names in zip(dys, members, hs, needs.members, strict=True):
        for name in names:
            found.append(_gradient_shape(name, dy, x, member, h))  # type: ignore[arg-type]
    return found


def _gradient_shape(name: str, dy: Tensor, x: Tensor, member: LoRAWeights, h: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    N = dy.shape[1]
    if name == "weight":
        return (N, x.shape[-1]), dy.dtype
    if name == "lora_A":
        return (member.lora_B.shape[1], x.shape[-1]), member.lora_B.dtype
    if name == "lora_B":
        return (N, h.shape[1]), h.dtype
    return (N,), torch.promote_types(dy.dtype, torch.float32)


LINEAR = register(Operation("linear", "lora_linear", check, shapes, kept, gradient_shapes))
