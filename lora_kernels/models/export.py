"""Write a fine-tuned model without LoRA layers, W + s·B·A in place of W, one layer in memory at a time."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.frozen_weight import FrozenWeight, is_linear4bit
from ..layers.linear import LoRALinear
from ..nf4.weight import NF4Weight
from .state import lora_layers

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def merged_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The plain model's state dict with the active adapter merged into dense weights; each is made when it is asked for.

    dtype: of all floating-point tensors; by default their own, and for a 4-bit weight that of the one that was quantised. The
    sum is rounded once to it, and the model is not changed. A tensor under several names is given once.
    """
    for name, value, layer in _plain_state(model, _layers(model)):
        tensor = value if layer is None else _merged_weight(layer, dtype)
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def save_merged(model: nn.Module, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write `merged_tensors(model, dtype)` to directory/model.safetensors, layer by layer, and a transformers model's
    configuration beside it, without its quantisation; the file's path.

    The file appears when it is complete. Raises ValueError if the model has no LoRA layers.
    """
    if not lora_layers(model):
        raise ValueError(f"model: {type(model).__name__} has no LoRA layers; call add_lora first")
    path = Path(directory) / "model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            header = json.dumps(_header(model, dtype)).encode()
            header += b" " * (-len(header) % 8)
            file.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in merged_tensors(model, dtype):
                file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _save_configuration(model, path.parent, dtype)
    return path


def _layers(model: nn.Module) -> dict[str, FrozenWeight]:
    """LoRA layers and, as layers without an adapter, bitsandbytes' quantised ones."""
    layers: dict[str, FrozenWeight] = dict(lora_layers(model))
    for path, module in model.named_modules():
        if is_linear4bit(module) and getattr(module.weight, "quant_state", None) is not None:
            layers[path] = FrozenWeight(NF4Weight.from_bnb(module.weight), None)  # type: ignore[arg-type]
    return layers


def _plain_state(model: nn.Module, layers: dict[str, FrozenWeight]) -> Iterator[tuple[str, Tensor, FrozenWeight | None]]:
    """(name, tensor, the layer whose weight it stands for, or None) of the plain model: the state dict without what adapters
    and 4-bit storage add to it.
    """
    seen = set()
    for name, value in model.state_dict().items():
        owner = next((path for path in layers if name.startswith(f"{path}.")), None)
        if owner is not None and name.removeprefix(f"{owner}.") not in ("weight", "bias"):
            continue
        place = value.data_ptr(), value.shape, value.dtype
        if value.numel() and not value.is_meta and place in seen:
            continue
        seen.add(place)
        yield name, value, layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def _merged_weight(layer: FrozenWeight, dtype: torch.dtype | None) -> Tensor:
    """W + s·B·A of the active adapter, as the plain layer stores it."""
    W = layer.matrix
    if isinstance(layer, LoRALinear) and layer.active_adapter is not None and not layer.merged:
        name = layer.active_adapter
        W = layer.plus(layer.lora_A[name], layer.lora_B[name], layer.adapters[name].scaling)
    elif isinstance(W, NF4Weight):
        W = W.dequantize(dtype)
    W = W.to(dtype or layer.base_dtype)
    return W.T.contiguous() if layer.fan_in_fan_out else W


def _header(model: nn.Module, dtype: torch.dtype | None) -> dict:
    """The safetensors header: dtype, shape and byte range of every tensor, known without computing any."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value, layer in _plain_state(model, _layers(model)):
        shape, kind = list(value.shape), value.dtype
        if layer is not None:
            shape, kind = [layer.out_features, layer.in_features], layer.base_dtype
            shape = shape[::-1] if layer.fan_in_fan_out else shape
        kind = dtype if dtype is not None and kind.is_floating_point else kind
        start, end = end, end + torch.Size(shape).numel() * kind.itemsize
        header[name] = {"dtype": SAFETENSORS_DTYPES[kind], "shape": shape, "data_offsets": [start, end]}
    return header


def _save_configuration(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> None:
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        return
    config: Any = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(directory)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
