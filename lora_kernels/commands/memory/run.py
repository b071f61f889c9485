"""`lora-kernels memory`: the bytes of training with QLoRA, with LoRA and of full fine-tuning, from shapes alone.

Counted: weights (QLoRA: those of the adapted layers in NF4, blocks of 64 with 8-bit absmax, the others as they are);
gradients; AdamW's two moments (each in its parameter's dtype, as torch.optim.AdamW keeps them); and the activations that
the adapted linear layers save for the backward pass *beyond their input x*, which every kind of training keeps and which
layers that read the same x share. LoRA saves h[M,R] per layer, and an 8-byte seed where dropout is on. Apart, and in no
total: what MLPs keep between their linear layers, frozen, with adapters in each layer alone, and fused. Not counted: x
itself, attention, norms, logits, workspaces, fragmentation, and float32 master weights.
"""

from dataclasses import asdict
from typing import Any

import torch

from ...dtypes import dtype_name
from ..console import Output, format_bytes
from ..layer_shapes import Layers
from .footprints import Between, footprints

CAPTION = (
    "QLoRA: adapted layers in NF4. Activations: what the linear layers save beyond their input x; every kind of training "
    "keeps x itself, which layers with the same input share: it is not counted. AdamW: two moments in the parameter's "
    "dtype. Not counted: attention, norms, logits, workspaces, master weights."
)


def run(
    layers: list[Layers],
    base_parameters: int,
    M: int,
    dropout: float,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    output: Output,
    mlps: Between = Between(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Print the tables and return what they show."""
    result = footprints(layers, base_parameters, M, dropout > 0, dtype, adapter_dtype)
    layer_rows = [_layer_row(group, M, dropout > 0, adapter_dtype.itemsize) for group in layers]
    columns = ("K → N", "layers", "rank", "adapter parameters", "saved beyond x")
    output.table(
        f"Adapted linear layers, M = {M} tokens", columns, layer_rows, less_important=("saved beyond x", "adapter parameters")
    )
    names = ("trainable_parameters", "weights", "adapters", "saved_activations", "gradients", "optimizer", "total")
    rows = []
    for name in names:
        values = [getattr(result[kind], name) for kind in ("qlora", "lora", "full")]
        readable = [f"{value:,}" if name == "trainable_parameters" else format_bytes(value) for value in values]
        rows.append((name.replace("_", " "), *readable))
    title = f"QLoRA, LoRA and full fine-tuning, base {dtype_name(dtype)}, adapters {dtype_name(adapter_dtype)}"
    output.table(title, ("", "QLoRA", "LoRA", "full fine-tuning"), rows, caption=CAPTION)
    between = mlps.saved_bytes(M, dtype.itemsize)
    if between["frozen"]:
        cells = [format_bytes(saved) for saved in between.values()]
        about = f"Saved between the MLPs' linear layers, M = {M} tokens, {dtype_name(dtype)}"
        output.table(about, ("frozen model", "each layer alone", "fused blocks"), [cells])
    return {
        "tokens": M,
        "dtype": dtype_name(dtype),
        "adapter_dtype": dtype_name(adapter_dtype),
        "dropout": dropout,
        "layers": [asdict(group) for group in layers],
        "saved_between_mlp_layers": between,
        **{kind: {**asdict(footprint), "total": footprint.total} for kind, footprint in result.items()},
        "counted": " ".join((__doc__ or "").split()),
    }


def _layer_row(group: Layers, M: int, dropout: bool, itemsize: int) -> tuple[str, ...]:
    saved = format_bytes(group.saved_bytes(M, itemsize, dropout))
    return f"{group.K} → {group.N}", f"{group.count}", f"{group.R}", f"{group.adapter_parameters:,}", saved
