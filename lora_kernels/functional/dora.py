"""dora_norm: the norm of DoRA's direction, W + s·B·A, by rows."""

import torch
from torch import Tensor

from .. import plan
from ..dtypes import wide_dtype, without_autocast
from ..nf4 import NF4Weight
from ..values import LoRAWeights
from .checks import check_member

CANCELLED = 1e-3  # of n² to the sum of its terms' sizes: below, float32 would leave fewer than four digits


@torch.no_grad()
def dora_norm(
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    squared_weight_norm: Tensor | None = None,
) -> Tensor:
    """n = ‖W + s·B·A‖ by rows, n[N] in float32 (float64 where a tensor is), without gradient; B·A is never formed whole.

    Shapes: weight W[N, K] (an NF4Weight in 4 bits), lora_A[R, K], lora_B[N, R].
    A new magnitude equal to n leaves the layer's function as it is (`lora_linear`, Liu et al. 2024, eq. 5).
    squared_weight_norm: ‖W‖² by rows, [N] in n's dtype, where it is at hand: n² is then ‖W‖² + 2s·Σ (W·Aᵀ) ⊙ B +
    s²·Σ (B·(A·Aᵀ)) ⊙ B, and the direct sum in rows where those terms cancel. On a CPU it is no faster than the direct sum.
    Raises TypeError or ValueError for arguments that do not fit.
    """
    if lora_A is None or lora_B is None:
        raise TypeError("lora_A, lora_B: got None, expected a torch.Tensor each")
    dtype = weight.dtype
    rows = lora_A.new_empty((0, lora_A.shape[-1]), dtype=dtype)
    check_member(rows, LoRAWeights(weight, lora_A, lora_B, None, scaling))
    norm = next(m for m in plan.modules("magnitude") if m.why_not(lora_A) is None).norm
    with without_autocast(lora_A.device):
        if squared_weight_norm is None:
            return norm(weight, lora_A, lora_B, scaling, dtype)
        wide = wide_dtype(dtype, lora_A.dtype)
        if squared_weight_norm.shape != weight.shape[:1] or squared_weight_norm.dtype != wide:
            raise ValueError(
                f"squared_weight_norm: got {squared_weight_norm.dtype} of shape {tuple(squared_weight_norm.shape)}, "
                f"expected {wide} of {tuple(weight.shape[:1])}, the sum of weight's squares by rows"
            )
        W = weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight
        A, B = lora_A.to(wide), scaling * lora_B.to(wide)
        cross, own = 2 * ((W.to(wide) @ A.T) * B).sum(1), ((B @ (A @ A.T)) * B).sum(1)
        squared = squared_weight_norm + cross + own
        cancelled = squared < CANCELLED * (squared_weight_norm + cross.abs() + own)
        if bool(cancelled.any()):
            squared = torch.where(cancelled, norm(weight, lora_A, lora_B, scaling, dtype) ** 2, squared)
        return squared.sqrt()
