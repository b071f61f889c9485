"""lora_embedding: its docstring, the checks of its arguments, and autograd's Function of it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.torch import embedding
from ..dtypes import FLOATS, without_autocast
from .checks import check_scaling


def lora_embedding(
    ids: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """y = W[i] + s·Aᵀ[i]·Bᵀ, with gradients for A, B, and W where it is trained too.

    Shapes: ids i[...] of int64 or int32, W[V, N], lora_A[R, V], lora_B[N, R] (PEFT's lora_embedding_A and _B) -> y[..., N].
    Dtypes: W any float, which is y's; the adapters share one, which may be another: they meet in the wider.
    padding_idx: as in `F.embedding`, the row that gets no gradient, in W and in A.

    Saves the indices: Aᵀ[i] is gathered again. dA has a sum for each column that was read, and needs no memory but its own.
    Raises TypeError or ValueError for arguments that do not fit, IndexError for an index outside, and RuntimeError on a second
    derivative.
    """
    check(ids, weight, lora_A, lora_B, scaling)
    V = len(weight)
    if padding_idx is not None:
        if not -V <= padding_idx < V:
            raise ValueError(f"padding_idx: got {padding_idx}, expected it within the {V} rows of weight")
        padding_idx %= V
    y = EmbeddingFunction.apply(ids.reshape(-1).long(), weight, lora_A, lora_B, scaling, padding_idx)
    return y.view(*ids.shape, weight.shape[1])


class EmbeddingFunction(torch.autograd.Function):
    """lora_embedding of ids[M], differentiable once."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float | Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids, A, B, s if isinstance(s, Tensor) else None)
        ctx.about = s, padding_idx, len(W)
        with without_autocast(W.device):
            return embedding.forward(ids, W, A, B, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, A, B, scaling = ctx.saved_tensors
        s, padding_idx, V = ctx.about
        _, need_W, *needs = ctx.needs_input_grad[:4]
        with without_autocast(dy.device):
            s = s if scaling is None else scaling
            grads = embedding.backward(dy, ids, A, B, s, padding_idx, V if need_W else None, tuple(needs))
        return None, *grads, None, None


def check(ids: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> None:
    """Raise TypeError or ValueError for arguments that do not fit."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids: got {got}, expected a tensor of int64 or int32; use ids.long()")
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {got}, expected a tensor of bfloat16, float16, float32 or float64")
        if tensor.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected two dimensions")
        if tensor.device != ids.device:
            raise ValueError(
                f"{name}: got a tensor on {tensor.device}, expected {ids.device} as ids; use {name}.to(ids.device)"
            )
    (V, N), R = weight.shape, len(lora_A)
    for name, tensor, shape in (("lora_A", lora_A, (R, V)), ("lora_B", lora_B, (N, R))):
        if R == 0 or tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {shape}, R at least 1, for weight {tuple(weight.shape)}"
            )
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_B: got dtype {lora_B.dtype}, expected {lora_A.dtype} as lora_A; use lora_B.to(lora_A.dtype)")
    check_scaling(scaling, ids.device, "")
