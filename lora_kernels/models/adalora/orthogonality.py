"""AdaLoRA's regulariser: what keeps A's rows and B's columns like singular vectors."""

import torch
from torch import Tensor, nn

from ...dtypes import without_autocast
from .config import active_adalora


def orthogonality_loss(model: nn.Module) -> Tensor:
    """orth_reg_weight · mean over layers of ½·(‖A·Aᵀ − I‖_F + ‖Bᵀ·B − I‖_F) of the active adapter: a term to add to the loss.

    What PEFT adds to `outputs.loss` (where a model returns one): the mean over all A and B, which are two for each layer, times
    the configuration's orth_reg_weight. Under autocast it stays in the adapters' dtype. Raises ValueError where the active
    adapter is not one of AdaLoRA.
    """
    name, config, layers = active_adalora(model)
    first = next(iter(layers.values())).lora_A[name]
    with without_autocast(first.device):
        grams = [A @ A.T for A in (layer.lora_A[name] for layer in layers.values())]
        grams += [B.T @ B for B in (layer.lora_B[name] for layer in layers.values())]
        stacked = torch.stack([gram.to(first.device, first.dtype) for gram in grams])
        distances = torch.linalg.vector_norm(
            stacked - torch.eye(stacked.shape[1], dtype=first.dtype, device=first.device), dim=(1, 2)
        )
        return config.orth_reg_weight * distances.mean()
