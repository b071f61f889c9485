"""lora_linear and lora_linear_group, and what their operation "linear" checks, returns and saves."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import wide_dtype
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
    magnitude: Tensor | None = None,
) -> Tensor:
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c, with gradients for x, A, B, c, and W where it is trained too (Hu et al. 2021, §4.1).

    Shapes: x[..., K], weight W[N, K], lora_A[R, K], lora_B[N, R], bias c[N], magnitude m[N] -> y[..., N].
    Dtypes: bfloat16, float16, float32 or float64. x, weight and bias share one, which is also y's; the adapters share one,
    which may be another (float32 adapters over a 16-bit base are computed in float32). Under torch.autocast, x, weight and
    bias of any dtype are read as autocast's.
    A 4-bit weight (NF4Weight, frozen) is read as x's dtype, in both directions, and bias with it; adapters as above (QLoRA,
    Dettmers et al. 2023).
    scaling: s = alpha / r, a float or a 0-d tensor, which is read on the device.
    dropout_p: applies whenever it is above 0; pass 0 in evaluation. The mask is `dropout_mask(M, K, dropout_p, seed)`.
    seed: None draws it from torch's generator of x's device.
    magnitude: m of DoRA, y = (m / n) ⊙ (x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + c with n = ‖W + s·B·A‖ by rows (`dora_norm`), constant in
    the gradient (Liu et al. 2024, eq. 5 and §4.3), in any dtype; m has a gradient. 0 where n is.

    Saves x itself, h = drop(x)·Aᵀ [M, R] and the seed for the backward pass, each only if a wanted gradient reads it; with a
    magnitude also n, and v = x·Wᵀ + s·h·Bᵀ [M, N] for m's gradient.
    Raises TypeError or ValueError for arguments that do not fit, and RuntimeError on a second derivative.
    """
    if lora_A is None:
        raise TypeError("lora_A: got None, expected a torch.Tensor; for no adapter use F.linear")
    member = LoRAWeights(weight, lora_A, lora_B, bias, scaling, magnitude)
    (y,) = call(LINEAR, x, (member,), Dropout(dropout_p, seed) if dropout_p else None)  # type: ignore[arg-type]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


def lora_linear_group(
    x: Tensor, members: Sequence[LoRAWeights], *, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> tuple[Tensor, ...]:
    """y_i = x·W_iᵀ + s_i·drop_i(x)·A_iᵀ·B_iᵀ + c_i of every member over one x, such as q, k and v, in one operation.

    Shapes: x[..., K], member i of W[N_i, K], A[R_i, K], B[N_i, R_i] -> a tuple of y_i[..., N_i]. A member whose lora_A and
    lora_B are None is plain: y_i = x·W_iᵀ + c_i. Dtypes, magnitudes, dropout_p, seed and gradients as in `lora_linear`; member
    i's mask is `dropout_mask(M, K, dropout_p, seed, offset=i)`. The gradient of x is summed up in one buffer; a member whose
    result is not used costs none.

    Saves x itself once, h_i [M, R_i] of each member and one seed, each only if a wanted gradient reads it.
    Raises TypeError or ValueError, naming members[i], for arguments that do not fit, and RuntimeError on a second derivative.
    """
    members = tuple(members)
    ys = call(LINEAR, x, members, Dropout(dropout_p, seed) if dropout_p else None)  # type: ignore[arg-type]
    return ys if x.ndim == 2 else tuple([y.view(*x.shape[:-1], y.shape[1]) for y in ys])


def backend_report(
    x: Tensor, weight: Tensor | NF4Weight | None = None, lora_A: Tensor | None = None, lora_B: Tensor | None = None
) -> BackendReport:
    """Why each backend is or is not used for a call with these tensors, under the current `use_backend` setting."""
    member = LoRAWeights(weight, lora_A, lora_B)  # type: ignore[arg-type]
    return report(describe("linear", use_backend.current, x.dtype, x.reshape(-1, x.shape[-1]), (member,), None, ()))


# ---- the operation ----


def check(x: Tensor, members: Members, dropout: Dropout | None) -> None:
    """Raise TypeError or ValueError for arguments that do not fit."""
    if not members:
        raise ValueError("members: got none, expected at least one LoRAWeights")
    for i, member in enumerate(members):
        check_member(x, member, f"members[{i}]." if len(members) > 1 else "")
    if dropout is not None:
        check_p(dropout.p)


Kind = tuple[tuple[int, ...], torch.dtype | None] | None
"""(shape, dtype) of a tensor that is saved, dtype None for that of the results; None for one that this call does not have."""


def shapes(x: Tensor, members: Members) -> tuple[list[tuple[int, ...]], list[Kind]]:
    """([M, N] of every y, those of every h, and where there are magnitudes of every v and n)."""
    M = rows(x)
    ys: list[tuple[int, ...]] = [(M, m.weight.shape[0]) for m in members]
    hs = [kind_of_h(M, m) for m in members]
    if all(m.magnitude is None for m in members):
        return ys, hs
    vs: list[Kind] = [None if m.magnitude is None else (y, None) for m, y in zip(members, ys, strict=True)]
    ns: list[Kind] = [
        None if m.magnitude is None else (y[1:], wide_dtype(x.dtype, m.lora_A.dtype))  # type: ignore[union-attr]
        for m, y in zip(members, ys, strict=True)
    ]
    return ys, [*hs, *vs, *ns]


def rows(x: Tensor) -> int:
    """M of x[..., K]. Size.numel() would fix a symbolic size, and every M be a graph of its own."""
    return math.prod(x.shape[:-1])


def kind_of_h(M: int, member: LoRAWeights) -> Kind:
    """Of h[M, R]."""
    return None if member.lora_A is None else ((M, member.lora_A.shape[0]), member.lora_A.dtype)


def kept(x: Tensor, members: Members, saved: tuple[Tensor | None, ...], dropout: Dropout | None, needs: Needs) -> tuple:
    """(x, members, saved, dropout) without what no wanted gradient reads.

    dx reads W, A and B, dA x and B, dB h, dW x, dm v; and with a magnitude all but dc read n.
    """
    count = len(members)
    hs, vs, ns = saved[:count], saved[count : 2 * count], saved[2 * count :]
    return (
        x if needs.any("lora_A", "weight") else None,
        tuple(kept_member(member, needs.x, names) for member, names in zip(members, needs.members, strict=True)),
        (
            *(h if "lora_B" in names else None for h, names in zip(hs, needs.members, strict=True)),
            *(v if "magnitude" in names else None for v, names in zip(vs, needs.members, strict=bool(vs))),
            *(n if needs.x or set(names) - {"bias"} else None for n, names in zip(ns, needs.members, strict=bool(ns))),
        ),
        dropout if needs.x or needs.any("lora_A") else None,
    )


def kept_member(member: LoRAWeights, need_x: bool, names: tuple[str, ...]) -> LoRAWeights:
    """The member without what neither the gradient of its input, if it is needed, nor those of these fields read."""
    return member._replace(
        weight=member.weight if need_x else None,  # type: ignore[arg-type]
        lora_A=member.lora_A if need_x else None,
        lora_B=member.lora_B if need_x or "lora_A" in names else None,
        bias=None,
    )


def gradient_shapes(
    dys: tuple[Tensor | None, ...], x: Tensor | None, members: Members, saved: tuple[Tensor | None, ...], needs: Needs
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each wanted gradient: dx, then the members'; dc is in float32 or wider."""
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    first = next(dy for dy in dys if dy is not None)
    if needs.x:
        found.append(((first.shape[0], members[0].weight.shape[1]), first.dtype))
    for dy, member, h, names in zip(dys, members, saved[: len(members)], needs.members, strict=True):
        for name in names:
            found.append(gradient_shape(name, dy, x, member, h))  # type: ignore[arg-type]
    return found


def gradient_shape(
    name: str, dy: Tensor, x: Tensor | None, member: LoRAWeights, h: Tensor | None
) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape, dtype) of the gradient of one field of a member; of dy only the shape [M, N] and the dtype are read."""
    N = dy.shape[1]
    if name == "weight":
        return (N, x.shape[-1]), dy.dtype  # type: ignore[union-attr]
    if name == "lora_A":
        return (member.lora_B.shape[1], x.shape[-1]), member.lora_B.dtype  # type: ignore[union-attr]
    if name == "lora_B":
        return (N, h.shape[1]), h.dtype  # type: ignore[union-attr]
    return (N,), torch.promote_types(dy.dtype, torch.float32)


LINEAR = register(Operation("linear", "lora_linear", check, shapes, kept, gradient_shapes))
