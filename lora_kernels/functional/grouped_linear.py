"""lora_grouped_linear and multi_lora_linear, and what their operation "grouped_linear" checks, returns and saves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mask import check_p
from ..nf4 import NF4Weight
from ..operation import Members, Operation, call, register
from ..segments import Segments
from ..values import Dropout, LoRAAdapter, LoRAWeights, Needs, Rows
from .grouped_checks import check_adapters, check_list, check_segments, check_stack
from .linear import Kind, rows


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    segments: Segments,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y_i = x_i·W_eᵀ + s·drop(x)_i·A_eᵀ·B_eᵀ + c_e for every row i of x, which belongs to segment e: experts with LoRA.

    Shapes: x[M, K], its rows sorted by segment, as tokens[segments.order]; weight W[E, N, K], or W[N, K] for all segments,
    lora_A[E, R, K], lora_B[E, N, R], bias c[E, N] or c[N] -> y[M, N], of which y[segments.inverse] is in the tokens' order.
    A row of no segment, among the last, has what is shared: x_i·Wᵀ + c; zeros where each has a weight and a bias of its own. No
    gradient reads such rows of x and dy then.
    A 4-bit weight is an NF4Weight of shape [N, K], or [E, N, K] whose blocks end where segments do. Dtypes, scaling, dropout_p
    and seed as in `lora_linear`; the mask is `dropout_mask(M, K, dropout_p, seed)` of the rows of x as they lie. Gradients of
    a segment without rows are zeros.

    Saves x itself, h = drop(x)·A_eᵀ [M, R], the seed and the offsets for the backward pass, each only if a wanted gradient
    reads it. No W + B·A is formed, and no rows are copied to be padded.
    Raises TypeError or ValueError for arguments that do not fit, and RuntimeError on a second derivative.
    """
    check_segments(x, segments)
    if x.ndim != 2:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, expected [M, K], sorted by segment; use x.flatten(0, -2)[segments.order]"
        )
    own = Rows(segments.offsets, None, segments.host)
    dropout = Dropout(dropout_p, seed) if dropout_p else None  # type: ignore[arg-type]
    (y,) = call(GROUPED_LINEAR, x, (LoRAWeights(weight, lora_A, lora_B, bias, scaling),), dropout, (own, ()))
    return y


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    adapters: Sequence[LoRAAdapter],
    segments: Segments,
    bias: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y_i = x_i·Wᵀ + s_e·drop_e(x)_i·A_eᵀ·B_eᵀ + c, e the adapter of row i: several adapters over one weight in one batch.

    Shapes: x[..., K], its M rows in any order; weight W[N, K] (dense or NF4Weight), bias c[N]; adapter e of A_e[R_e, K],
    B_e[N, R_e], s_e and dropout_p of its own -> y[..., N]. Rows of no segment have x_i·Wᵀ + c. Dtypes, scalings, seed and
    gradients as in `lora_linear`; all adapters have one dtype.
    The mask of row i is row i of `dropout_mask(M, K, dropout_p of e, seed)`: an adapter that is trained alone over other rows,
    or over the same ones elsewhere in the batch, sees another mask with the same seed.
    The gradients of an adapter without rows are None, so that no optimizer decays it; zeros in a compiled graph, or where
    the host does not know, as of ids on a GPU (make the segments of ids on the CPU and move them, or `segments.read()`).

    Saves x itself, h [M, the largest R], one seed, the offsets and the order, each only if a wanted gradient reads it.
    Raises TypeError or ValueError, naming adapters[i], for arguments that do not fit, and RuntimeError on a second derivative.
    """
    check_segments(x, segments)
    adapters = tuple(adapters)
    check_adapters(adapters, segments)
    members = [LoRAWeights(None, a.lora_A, a.lora_B, None, a.scaling) for a in adapters]  # type: ignore[arg-type]
    ps = tuple([adapter.dropout_p for adapter in adapters])
    dropout = Dropout(max(ps), seed) if any(ps) else None  # type: ignore[arg-type]
    own = Rows(segments.offsets, segments.order, segments.host)
    (y,) = call(GROUPED_LINEAR, x, (LoRAWeights(weight, None, None, bias), *members), dropout, (own, ps))  # type: ignore[arg-type]
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


# ---- the operation: members (stacks,) or (base, adapter 0, adapter 1, …); options (Rows, dropout_p of each adapter or ()) ----


def check(x: Tensor, members: Members, dropout: Dropout | None, of: Rows, ps: tuple[float, ...]) -> None:
    """Raise TypeError or ValueError for arguments that do not fit."""
    if len(members) == 1:
        check_stack(x, members[0], of)
    else:
        check_list(x, members, of)
    for p in ps if dropout is None else (dropout.p, *ps):
        check_p(p)


def shapes(x: Tensor, members: Members, of: Rows, ps: tuple[float, ...]) -> tuple[list[tuple[int, ...]], list[Kind]]:
    """([M, N] of y, [M, the largest R] of h)."""
    M, adapters = rows(x), [member.lora_A for member in members if member.lora_A is not None]
    return [(M, members[0].weight.shape[-2])], [((M, max([A.shape[-2] for A in adapters])), adapters[0].dtype)]


def kept(x: Tensor, members: Members, saved: tuple[Tensor | None, ...], dropout: Dropout | None, needs: Needs) -> tuple:
    """(x, members, saved, dropout) without what no wanted gradient reads.

    As in linear.py; and a tensor whose gradient is wanted is kept for its shape: B for A's too.
    """
    through = needs.x or needs.any("lora_A")
    return (
        x if needs.any("lora_A", "weight") else None,
        tuple([kept_member(member, needs.x, names) for member, names in zip(members, needs.members, strict=True)]),
        (saved[0] if needs.any("lora_B") else None,),
        dropout if through else None,
    )


def kept_member(member: LoRAWeights, need_x: bool, names: tuple[str, ...]) -> LoRAWeights:
    """The member without what neither the gradient of x, if it is needed, nor those of these fields read."""
    return LoRAWeights(
        member.weight if need_x or "weight" in names else None,  # type: ignore[arg-type]
        member.lora_A if need_x else None,
        member.lora_B if need_x or "lora_A" in names or "lora_B" in names else None,
        member.bias if "bias" in names else None,
        member.scaling,
    )


def gradient_shapes(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: Members,
    saved: tuple[Tensor | None, ...],
    needs: Needs,
    of: Rows,
    ps: tuple[float, ...],
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each wanted gradient: dx, then the members'; dc is in float32 or wider."""
    (dy,) = dys
    assert dy is not None
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    if needs.x:
        found.append(((dy.shape[0], members[0].weight.shape[-1]), dy.dtype))
    for (weight, _, B, bias, _, _), names in zip(members, needs.members, strict=True):
        for name in names:
            if name == "weight":
                found.append((weight.shape, dy.dtype))
            elif name == "bias":
                found.append((bias.shape, torch.promote_types(dy.dtype, torch.float32)))  # type: ignore[union-attr]
            elif name == "lora_A":
                found.append(((*B.shape[:-2], B.shape[-1], x.shape[-1]), B.dtype))  # type: ignore[union-attr]
            else:
                found.append((B.shape, B.dtype))  # type: ignore[union-attr]
    return found


GROUPED_LINEAR = register(Operation("grouped_linear", "lora_grouped_linear", check, shapes, kept, gradient_shapes))
