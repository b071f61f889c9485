"""The forward of transformers' experts modules: y = Σ_k w_k·down_e(act(up_e(x))) over a token's experts e, maybe with LoRA.

transformers 5 keeps the experts of a layer in stacks, gate_up_proj[E, 2·I, H] (up_proj[E, I, H] without gate) and
down_proj[E, H, I], the last two dimensions exchanged where `is_transposed`. PEFT's adapter of such a stack has A[E·r, in], an
expert after the other, and B[out, r·E], a rank after the other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.experts import gated_activation, rows_by_expert, rows_by_token
from ..functional.grouped_linear import lora_grouped_linear
from ..nf4 import NF4Weight
from ..segments import Segments
from ..values import LoRAAdapter
from .experts_4bit import quantized_stack, why_not_4_bit

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # what use_experts_implementation says of a class
ACTIVATIONS = {  # modules of torch.nn and transformers.activations -> the operation's name
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
Adapters = Mapping[str, LoRAAdapter | None]
NO_ADAPTERS: Adapters = {}


def is_experts(module: nn.Module) -> bool:
    """Whether it is a module of a class that transformers' use_experts_implementation has decorated."""
    return all(hasattr(module, name) for name in FLAGS) and hasattr(module, "_apply_gate")


def weight_names(experts: Any) -> tuple[str, str]:
    """The stacks of the first product and of the second."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def sizes(experts: Any, weight: Tensor | NF4Weight) -> tuple[int, int, int]:
    """(E, out, in) of a stack."""
    E, rows, columns = weight.shape
    return (E, columns, rows) if experts.is_transposed else (E, rows, columns)


def stacked(A: Tensor, B: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """PEFT's A[E·r, in] and B[out, r·E] -> A[E, r, in], a view, and B[E, out, r], a copy: it is a rank after the other."""
    return A.reshape(E, -1, A.shape[1]), B.reshape(B.shape[0], -1, E).permute(2, 0, 1).contiguous()


def experts_forward(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Adapters = NO_ADAPTERS,
) -> Tensor:
    """y[tokens, H] of hidden_states[tokens, H], the numbers of each token's experts [tokens, k] and their weights [tokens, k].

    adapters: by a stack's name, A[E, r, in] and B[E, out, r]. The rows are sorted by expert once; no stack is summed with B·A,
    and experts without rows cost nothing. A number outside 0 … E - 1, as of an expert on another device, adds zeros.
    """
    first, second = weight_names(experts)
    W, k = _matrix(experts, first), top_k_index.shape[-1]
    E = W.shape[0]
    ids = top_k_index.reshape(-1)
    segments = Segments.from_ids(ids.masked_fill((ids < 0) | (ids >= E), -1), E)
    h = _product(experts, first, rows_by_expert(hidden_states, segments, k), segments, adapters)
    y = _product(experts, second, _activated(experts, h), segments, adapters)
    rows = rows_by_token(y, segments).unflatten(0, (-1, k))
    dtype = torch.promote_types(y.dtype, top_k_weights.dtype)
    weighted = top_k_weights.to(dtype).unsqueeze(1) @ rows.to(dtype)  # without a weighted copy of every row
    return weighted.squeeze(1).to(hidden_states.dtype)


def _product(experts: Any, name: str, x: Tensor, segments: Segments, adapters: Adapters) -> Tensor:
    """One product of rows by expert; without an adapter, with one of zeros."""
    W, bias = _matrix(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None
    adapter = adapters.get(name)
    if adapter is None:
        E, N, K = W.shape
        adapter = LoRAAdapter(x.new_zeros(E, 1, K, dtype=W.dtype), x.new_zeros(E, N, 1, dtype=W.dtype))
    A, B, scaling, p = adapter
    return lora_grouped_linear(x, W, A, B, segments, bias, scaling=scaling, dropout_p=p)


def _matrix(experts: Any, name: str) -> Tensor | NF4Weight:
    """W[E, out, in], wherever it is: the parameter of this name, the LoRAStack in its place, or bitsandbytes' codes."""
    if (stack := experts._modules.get(name)) is not None:
        return stack.matrix
    if (w := quantized_stack(experts, name)) is None:
        weight = getattr(experts, name)
        return weight.mT if experts.is_transposed else weight
    if (reason := why_not_4_bit(experts.is_transposed, w.shape, w.blocksize)) is not None:
        raise ValueError(
            f"{name}: got a 4-bit stack {tuple(w.shape)}, expected a dense one, as {reason}; the experts implementation "
            '"eager" dequantises it at each call'
        )
    return w


def _activated(experts: Any, h: Tensor) -> Tensor:
    """act(gate)·up as one operation where the class has transformers' own, or else what its `_apply_gate` computes."""
    gate = type(experts)._apply_gate
    kind = type(getattr(experts, "act_fn", None))
    known = gate.__name__ == "_default_apply_gate" and kind.__module__.startswith(("torch.nn.", "transformers."))
    if known and kind.__name__ in ACTIVATIONS:
        return gated_activation(h, ACTIVATIONS[kind.__name__], experts.has_gate)
    return experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
