"""`lora-kernels memory`: the bytes of training with QLoRA, with LoRA and of full fine-tuning, from shapes alone.

Counted: weights (QLoRA: those of the adapted layers in NF4, blocks of 64 with 8-bit absmax, the others as they are);
gradients; AdamW's two moments (each in its parameter's dtype, as torch.optim.AdamW keeps them); and the activations that
the adapted linear layers save for the backward pass *beyond their input x*, which every kind of training keeps and which
layers that read the same x share. LoRA saves h[M,R] per layer, and an 8-byte seed where dropout is on. Not counted: x
itself, attention, norms, logits, workspaces, fragmentation, and float32 master weights.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dtypes import dtype_name
from ..layers.linear import LoRALinear
from ..models.config import LoRAConfig
from ..models.surgery import add_lora
from ..nf4.weight import quantize_nf4
from .console import CommandError, Output, format_bytes
from .pretrained import meta_model

SEED_BYTES = 8
ADAMW_MOMENTS = 2
SHAPE = re.compile(r"(\d+)x(\d+)(?::(\d+))?")
CAPTION = (
    "QLoRA: adapted layers in NF4. Activations: what the linear layers save beyond their input x; every kind of training "
    "keeps x itself, which layers with the same input share: it is not counted. AdamW: two moments in the parameter's "
    "dtype. Not counted: attention, norms, logits, workspaces, master weights."
)


@dataclass(frozen=True)
class Layers:
    """`count` linear layers K -> N with adapters of rank R."""

    K: int
    N: int
    count: int
    R: int

    @property
    def adapter_parameters(self) -> int:
        return self.count * self.R * (self.K + self.N)

    def saved_bytes(self, M: int, itemsize: int, dropout: bool) -> int:
        """h[M,R] in the adapter's dtype for every layer, and the seed."""
        return self.count * (M * self.R * itemsize + (SEED_BYTES if dropout else 0))

    @property
    def parameters(self) -> int:
        return self.count * self.K * self.N

    @property
    def nf4_bytes(self) -> int:
        """The weights in NF4: that of an NF4Weight without values."""
        return self.count * quantize_nf4(torch.empty(self.N, self.K, device="meta")).nbytes


@dataclass(frozen=True)
class Size:
    """The linear layers and vocabulary of a well-known model; all but the embedding and the head are adapted."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int

    def adapted(self, R: int) -> list[Layers]:
        shapes = Counter(
            {(self.hidden, self.hidden): 2, (self.hidden, self.intermediate): 2, (self.intermediate, self.hidden): 1}
        )
        shapes[self.hidden, self.key_value] += 2
        return [Layers(K, N, count * self.layers, R) for (K, N), count in shapes.items()]

    @property
    def parameters(self) -> int:
        """All of them: the adapted layers, embedding and head, and the norms."""
        norms = (2 * self.layers + 1) * self.hidden
        return sum(group.parameters for group in self.adapted(1)) + 2 * self.vocabulary * self.hidden + norms


SIZES = {
    "7b": Size("Llama-2-7B", 32, 4096, 11008, 4096, 32000),
    "8b": Size("Llama-3.1-8B", 32, 4096, 14336, 1024, 128256),
    "70b": Size("Llama-3.1-70B", 80, 8192, 28672, 1024, 128256),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one way of training, and the number of parameters that it trains."""

    trainable_parameters: int
    weights: int
    adapters: int
    saved_activations: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.saved_activations + self.gradients + self.optimizer


def parse_shapes(shapes: Iterable[str], rank: int) -> list[Layers]:
    """["4096x14336:32"] -> 32 layers K=4096, N=14336; the count is 1 where it is left out. Raises CommandError."""
    result = []
    for text in shapes:
        match = SHAPE.fullmatch(text)
        if not match or 0 in (numbers := [int(number or 1) for number in match.groups()]):
            raise CommandError(f"--shape: got {text!r}, expected KxN or KxN:COUNT, positive, as in 4096x14336:32")
        K, N, count = numbers
        result.append(Layers(K, N, count, rank))
    check_rank(result)
    return result


def layers_of_model(directory: Path, config: LoRAConfig) -> tuple[list[Layers], int]:
    """(the layers that `config` adapts in the model of `directory`, the number of its base parameters)."""
    model = meta_model(directory)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        add_lora(model, config)
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model: {error}") from error
    layers = group_layers(model)
    check_rank(layers)
    return layers, base_parameters


def check_rank(layers: Iterable[Layers]) -> None:
    """Raise CommandError unless every rank is from 1 to min(K, N): more cannot express more than W itself."""
    for group in sorted(layers, key=lambda group: min(group.K, group.N)):  # the tightest limit is the useful one
        limit = min(group.K, group.N)
        if not 1 <= group.R <= limit:
            raise CommandError(f"--rank: got {group.R}, expected 1 to {limit} for the layer {group.K}x{group.N}")


def group_layers(model: nn.Module) -> list[Layers]:
    """The LoRALinear layers of `model`, equal shapes and ranks together."""
    adapted = (module for module in model.modules() if isinstance(module, LoRALinear))
    shapes = Counter((layer.in_features, layer.out_features, A.shape[0]) for layer in adapted for A in layer.lora_A.values())
    return [Layers(K, N, count, R) for (K, N, R), count in shapes.items()]


def footprints(
    layers: list[Layers],
    base_parameters: int,
    M: int,
    dropout: bool,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> dict[str, Footprint]:
    """The footprints "qlora", "lora" and "full" for M tokens per step; "full" trains all `base_parameters` of the model."""
    weights, adapter_bytes = base_parameters * dtype.itemsize, adapter_dtype.itemsize
    adapters = sum(group.adapter_parameters for group in layers)
    saved = sum(group.saved_bytes(M, adapter_bytes, dropout) for group in layers)
    size = adapters * adapter_bytes
    nf4 = sum(group.nf4_bytes - group.parameters * dtype.itemsize for group in layers)
    return {
        "qlora": Footprint(adapters, weights + nf4, size, saved, size, ADAMW_MOMENTS * size),
        "lora": Footprint(adapters, weights, size, saved, size, ADAMW_MOMENTS * size),
        "full": Footprint(base_parameters, weights, 0, 0, weights, ADAMW_MOMENTS * weights),
    }


def run(
    layers: list[Layers],
    base_parameters: int,
    M: int,
    dropout: float,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    output: Output,
) -> dict[str, Any]:
    """Print the two tables and return what they show."""
    if M < 1:
        raise CommandError(f"--tokens: got {M}, expected at least 1")
    if not 0 <= dropout <= 1:
        raise CommandError(f"--dropout: got {dropout}, expected a probability in [0, 1]")
    result = footprints(layers, base_parameters, M, dropout > 0, dtype, adapter_dtype)
    layer_rows = [_layer_row(group, M, dropout > 0, adapter_dtype.itemsize) for group in layers]
    columns = ("K → N", "layers", "rank", "adapter parameters", "saved beyond x")
    output.table(f"Adapted linear layers, M = {M} tokens", columns, layer_rows)
    names = ("trainable_parameters", "weights", "adapters", "saved_activations", "gradients", "optimizer", "total")
    rows = []
    for name in names:
        values = [getattr(result[kind], name) for kind in ("qlora", "lora", "full")]
        readable = [f"{value:,}" if name == "trainable_parameters" else format_bytes(value) for value in values]
        rows.append((name.replace("_", " "), *readable))
    title = f"QLoRA, LoRA and full fine-tuning, base {dtype_name(dtype)}, adapters {dtype_name(adapter_dtype)}"
    output.table(title, ("", "QLoRA", "LoRA", "full fine-tuning"), rows, caption=CAPTION)
    return {
        "tokens": M,
        "dtype": dtype_name(dtype),
        "adapter_dtype": dtype_name(adapter_dtype),
        "dropout": dropout,
        "layers": [asdict(group) for group in layers],
        **{kind: {**asdict(footprint), "total": footprint.total} for kind, footprint in result.items()},
        "counted": " ".join((__doc__ or "").split()),
    }


def _layer_row(group: Layers, M: int, dropout: bool, itemsize: int) -> tuple[str, ...]:
    saved = format_bytes(group.saved_bytes(M, itemsize, dropout))
    return f"{group.K} → {group.N}", f"{group.count}", f"{group.R}", f"{group.adapter_parameters:,}", saved
