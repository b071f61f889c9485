"""The accelerated form of PEFT's LoRA layer over nn.Embedding."""

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ...functional.embedding import lora_embedding
from ...layers.embedding import why_not_embedding
from .linear import ShownAsPeft
from .not_linear import NotLinear, why_not_tensors
from .parts import why_not_called


class AcceleratedEmbedding(NotLinear, lora.Embedding, metaclass=ShownAsPeft):
    """peft.tuners.lora.Embedding over an nn.Embedding, computed by lora_embedding; PEFT drops nothing there either."""

    def _why_not_adapter(self: Any, name: str) -> str | None:
        base, A, B = self.base_layer, self.lora_embedding_A[name], self.lora_embedding_B[name]
        if type(base) is not nn.Embedding:
            return f"the base layer is a {type(base).__name__}"
        if (reason := why_not_embedding(base)) is not None:
            return reason
        if name in getattr(self, "input_fns", ()):
            return "tensor parallelism"
        if A.dtype != B.dtype:
            return "lora_embedding_A and lora_embedding_B differ in dtype"
        return why_not_called((base,), hooked=True) or why_not_tensors(base.weight, A, B)

    def _why_not_input(self: Any, ids: Tensor, name: str) -> str | None:
        if ids.dtype not in (torch.int64, torch.int32):
            return f"indices of {ids.dtype}"
        return None if ids.device == self.base_layer.weight.device else "tensors on different devices"

    def _computed(self: Any, ids: Tensor, name: str) -> Tensor:
        A, B, base = self.lora_embedding_A[name], self.lora_embedding_B[name], self.base_layer
        return lora_embedding(ids, base.weight, A, B, scaling=self.scaling[name], padding_idx=base.padding_idx)
