"""lora_glu_mlp, and what the operation "glu_mlp" checks, returns and saves."""

import torch
from torch import Tensor

from ..mask import check_p
from ..operation import Members, Operation, call, register
from ..values import ACTIVATIONS, Dropout, LoRAWeights, Needs
from .checks import check_member
from .linear import Kind, gradient_shape, kept_member, kind_of_h, rows


def lora_glu_mlp(
    x: Tensor,
    gate: LoRAWeights | None,
    up: LoRAWeights,
    down: LoRAWeights,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = down(act(gate(x))·up(x)), or down(act(up(x))) where gate is None (Shazeer 2020, "GLU variants"): three `lora_linear`
    and the activation between them as one operation, with the gradients of all of them.

    Shapes: x[..., K], gate and up of W[I, K], down of W[N, I] -> y[..., N]. A member whose lora_A and lora_B are None is plain.
    activation: "silu", "gelu" (with erf), "gelu_tanh" (its tanh approximation) or "relu2" (relu(v)²); act(gate)·up is computed
    in float32 or wider and rounded once. Dtypes, dropout_p, seed and gradients as in `lora_linear`; the masks are
    `dropout_mask(M, K or I, dropout_p, seed, offset)` with offset 0 for gate, 1 for up, 2 for down.

    Saves x, gate's and up's outputs [M, I], h [M, R] of each member and one seed, each only if a wanted gradient reads it: less
    than PyTorch saves for the same frozen layers, which keeps act(gate) and its product with up too.
    Raises TypeError or ValueError, naming the member, for arguments that do not fit, and RuntimeError on a second derivative.
    """
    members = (up, down) if gate is None else (gate, up, down)
    dropout = Dropout(dropout_p, seed, 3 - len(members)) if dropout_p else None  # type: ignore[arg-type]
    (y,) = call(GLU_MLP, x, members, dropout, (activation,))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[1])


# ---- the operation: members (gate, up, down) or (up, down); saved (e, u, h of each) or (u, h of each) ----


def check(x: Tensor, members: Members, dropout: Dropout | None, activation: str) -> None:
    """Raise TypeError or ValueError for arguments that do not fit."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    *inner, down = members
    for member, name in zip(members, ("gate", "up", "down")[-len(members) :], strict=True):
        if isinstance(member, LoRAWeights) and member.magnitude is not None:
            raise ValueError(f"{name}.magnitude: got one, expected None; compute an MLP with DoRA by lora_linear")
    for member, name in zip(inner, ("gate", "up")[-len(inner) :], strict=True):
        check_member(x, member, f"{name}.")
    features, shape = inner[0].weight.shape[0], tuple(inner[-1].weight.shape)
    if shape[0] != features:
        raise ValueError(f"up.weight: got shape {shape}, expected [{features}, {shape[1]}], with the out-features of gate")
    check_member(x, down, "down.", features=features)
    if dropout is not None:
        check_p(dropout.p)


def shapes(x: Tensor, members: Members, activation: str) -> tuple[list[tuple[int, ...]], list[Kind]]:
    """([M, N] of y, those of e, u and every h)."""
    M = rows(x)
    *inner, down = members
    outputs: list[Kind] = [((M, member.weight.shape[0]), None) for member in inner]
    return [(M, down.weight.shape[0])], outputs + [kind_of_h(M, member) for member in members]


def kept(x: Tensor, members: Members, saved: tuple[Tensor | None, ...], dropout: Dropout | None, needs: Needs) -> tuple:
    """(x, members, saved, dropout) without what no wanted gradient reads.

    What lies before the activation is read through it: its gradients need da, and that W, A and B of down; e and u, act'.
    """
    *inner, down = members
    *of_inner, of_down = needs.members
    through = needs.x or any(of_inner)
    outputs, hs = saved[: len(inner)], saved[len(inner) :]
    activated = through or "lora_A" in of_down or "weight" in of_down
    pruned = [kept_member(member, needs.x, names) for member, names in zip(inner, of_inner, strict=True)]
    return (
        x if any(name in names for names in of_inner for name in ("lora_A", "weight")) else None,
        (*pruned, kept_member(down, through, of_down)),
        (
            *(output if activated else None for output in outputs),
            *(h if "lora_B" in names else None for h, names in zip(hs, needs.members, strict=True)),
        ),
        dropout if through or needs.any("lora_A") else None,
    )


def gradient_shapes(
    dys: tuple[Tensor | None, ...],
    x: Tensor | None,
    members: Members,
    saved: tuple[Tensor | None, ...],
    needs: Needs,
    activation: str,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each wanted gradient: dx, then the members'; dc is in float32 or wider."""
    (dy,), count = dys, len(members)
    assert dy is not None
    u, hs = saved[count - 2], saved[count - 1 :]
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    if needs.x:
        found.append(((dy.shape[0], members[0].weight.shape[1]), dy.dtype))
    for i, (member, h, names) in enumerate(zip(members, hs, needs.members, strict=True)):
        down = i == count - 1
        for name in names:
            found.append(gradient_shape(name, dy if down else u, u if down else x, member, h))  # type: ignore[arg-type]
    return found


GLU_MLP = register(Operation("glu_mlp", "lora_glu_mlp", check, shapes, kept, gradient_shapes))
