"""LoRAEmbedding: a drop-in nn.Embedding; made here, from sizes or a layer, computed here and made a plain layer again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.embedding import lora_embedding
from .adapters import DEFAULT_ADAPTER, AdaptedWeight, Adapter
from .initialization import rewrites_weight
from .stand_in import refuse_options, stand_in


class LoRAEmbedding(AdaptedWeight):
    """y = W[i] + s·Aᵀ[i]·Bᵀ: a drop-in nn.Embedding with named low-rank adapters, one of them active.

    ids i[...] -> y[..., embedding_dim]. `weight` [num_embeddings, embedding_dim] (frozen) keeps nn.Embedding's name, and stays
    one with a head that is tied to it; adapter `name` is `lora_A[name]` [r, num_embeddings] and `lora_B[name]`
    [embedding_dim, r], PEFT's lora_embedding_A and lora_embedding_B. Scaling and merging are as in LoRALinear; merged, the
    layer has a weight of its own. As in PEFT lora_dropout does nothing here: there is no input to drop. padding_idx: of
    nn.Embedding, whose row of A gets no gradient; max_norm, scale_grad_by_freq and sparse are refused.

    init_lora_weights: True (A zero, B normal, as in PEFT, for which any other initialisation that keeps the weight means this
    one), or False (A and B normal, for tests).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        r: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **adapter: Any,
    ):
        """adapter: the options of `add_adapter`; lora_alpha defaults to 8."""
        self._init(nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype))
        self._source: tuple[nn.Module, ...] = ()
        self.add_adapter(DEFAULT_ADAPTER, r, adapter.pop("lora_alpha", 8), **adapter)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Module, *, r: int | None = 8, adapter_name: str = DEFAULT_ADAPTER, **adapter: Any
    ) -> "LoRAEmbedding":
        """A LoRAEmbedding over `embedding`'s own weight, shared and frozen, with its training mode and hooks.

        adapter: the options of `add_adapter`; lora_alpha defaults to 8. r=None adds no adapter.
        Raises TypeError or ValueError for what cannot be adapted.
        """
        if type(embedding) is not nn.Embedding:
            raise TypeError(f"embedding: got {type(embedding).__name__}, expected nn.Embedding")
        if (reason := why_not_embedding(embedding)) is not None:
            raise ValueError(f"embedding: {reason}")
        flags = [(parameter, parameter.requires_grad) for parameter in embedding.parameters()]
        layer = cls.__new__(cls)
        layer._init(embedding)
        layer._source = (embedding,)  # a tuple hides it from nn.Module
        stand_in(layer, embedding, flags, r, adapter_name, adapter)
        return layer

    def _init(self, embedding: nn.Embedding) -> None:
        AdaptedWeight.__init__(self, embedding.weight, None, fan_in_fan_out=True)  # type: ignore[arg-type]
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    def to_plain(self) -> nn.Module:
        """The nn.Embedding, the one given to `from_embedding` or a new one, with the merged weight or else the original one."""
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        embedding = (self._source or (made,))[0].train(self.training)
        embedding.weight = self.weight
        return embedding

    def forward(self, ids: Tensor) -> Tensor:
        name = self.active_adapter
        if name is not None and not self._unmerged:
            A, B, scaling = self.lora_A[name], self.lora_B[name], self.adapters[name].scaling
            return lora_embedding(ids, self.weight, A, B, scaling=scaling, padding_idx=self.padding_idx)
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("LoRAEmbedding is merged, so its adapter gets no gradient: call unmerge() to train, or eval()")
        return F.embedding(ids, self.weight, self.padding_idx)

    def add_adapter(self, name: str, r: int, lora_alpha: float, **options: Any) -> None:
        refuse_options("Embedding", **{key: options.get(key) for key in ("use_dora", "use_adalora", "lora_bias")})
        if rewrites_weight(init := options.get("init_lora_weights", True)):
            refuse_options("Embedding", init_lora_weights=init)
        super().add_adapter(name, r, lora_alpha, **options)

    @torch.no_grad()
    def _initialize(self, adapter: Adapter, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor | None = None) -> None:
        nn.init.normal_(lora_B)
        if adapter.init_lora_weights is False:
            nn.init.normal_(lora_A)
        else:
            nn.init.zeros_(lora_A)

    def reset_parameters(self) -> None:
        """nn.Embedding's initialisation of the weight, and that of every adapter: for a layer made on the meta device."""
        self._refuse_if_merged("reset the layer")
        nn.Embedding.reset_parameters(self)  # type: ignore[arg-type]
        for name in self.adapters:
            self.reset_lora_parameters(name)

    def _fill_padding_idx_with_zero(self) -> None:
        nn.Embedding._fill_padding_idx_with_zero(self)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={a.r}, lora_alpha={a.lora_alpha}" for name, a in self.adapters.items())
        base = f"{self.num_embeddings}, {self.embedding_dim}" + f", padding_idx={self.padding_idx}" * (
            self.padding_idx is not None
        )
        return f"{base}, active={self.active_adapter}, merged={self.merged}, adapters={{{adapters}}}"


def why_not_embedding(embedding: nn.Embedding) -> str | None:
    """Why an nn.Embedding cannot be adapted."""
    if embedding.max_norm is not None:
        return f"an Embedding with max_norm={embedding.max_norm}, which rewrites the frozen rows that are read"
    for name in ("scale_grad_by_freq", "sparse"):
        if getattr(embedding, name):
            return f"an Embedding with {name}=True, of which the gradients of a low-rank adapter know nothing"
    return None
