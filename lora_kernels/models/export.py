"""Write a fine-tuned model without LoRA layers, W + s·B·A in place of W, one shard in memory at a time."""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapters import AdaptedWeight
from ..layers.experts import is_experts, weight_names
from ..layers.experts_4bit import quantized_stack
from ..layers.frozen_weight import FrozenWeight, is_linear4bit
from ..layers.merging import LowRankTerm, bias_sum
from ..layers.offload import offloaded_tensors, onloaded
from ..nf4 import NF4Weight
from .atomic_files import all_or_nothing
from .distributed import refuse_fsdp2
from .names import parents
from .shards import remove_shards, write_shards
from .state import adapted_layers, refuse_offloaded_adapters
from .wrappers import named_modules, plain_names, plain_state_dict, unwrapped


def merged_tensors(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """The plain model's state dict with the active adapter merged into dense weights; each is made when it is asked for.

    dtype: of all floating-point tensors; by default their own, and for a 4-bit weight that of the one that was quantised. The
    sum is rounded once to it, and the model is not changed. A tensor under several names is given once.
    """
    for name, value, layer in _plain_state(model, _layers(model)):
        merged = _merged_bias if name.endswith("bias") else _merged_weight
        tensor = value if layer is None else merged(layer, dtype)
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def save_merged(
    model: nn.Module, directory: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int = 4 << 30
) -> Path:
    """Write `merged_tensors(model, dtype)` as safetensors into `directory`, and a transformers model's configuration beside it,
    without its quantisation; the path of model.safetensors, or of model.safetensors.index.json if there are several shards.

    max_shard_size: bytes of a file's tensors; a tensor that is larger has a file of its own. In memory are, beside the model,
    a shard, of which tensors that are written as they are cost nothing, and one layer in up to three float32 copies. With
    safetensors before 0.8 the shard is copied once more.
    The files appear when all are complete, and replace a model saved there before. Raises ValueError if the model has no LoRA
    layers, FSDP2 shards it, or max_shard_size is below 1, and RuntimeError if accelerate offloads the adapters.
    """
    if not isinstance(max_shard_size, int) or max_shard_size < 1:
        raise ValueError(f"max_shard_size: got {max_shard_size!r}, expected a number of bytes of at least 1")
    layers = adapted_layers(model)
    refuse_fsdp2(model, "save the merged model")
    refuse_offloaded_adapters(model, "save the merged model", on_their_own=not all(layer.merged for layer in layers.values()))
    written: set[str] = set()
    with all_or_nothing(Path(directory)) as folder:
        names = write_shards(_noted(merged_tensors(model, dtype), written), folder, max_shard_size)
        _save_configuration(unwrapped(model), folder, dtype, written)
    remove_shards(Path(directory), names)
    return Path(directory) / names[-1]


def _noted(tensors: Iterable[tuple[str, Tensor]], names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """`tensors`, whose names go into `names`."""
    for name, tensor in tensors:
        names.add(name)
        yield name, tensor


def _layers(model: nn.Module) -> dict[str, FrozenWeight]:
    """LoRA layers and, as layers without an adapter, bitsandbytes' quantised ones and stacks of experts."""
    layers: dict[str, FrozenWeight] = {}
    for path, module in named_modules(model, remove_duplicate=False):
        if isinstance(module, AdaptedWeight):
            layers[path] = module
        elif is_linear4bit(module) and getattr(module.weight, "quant_state", None) is not None:
            layers[path] = FrozenWeight(NF4Weight.from_bnb(module.weight), None)  # type: ignore[arg-type]
        for name in weight_names(module) if is_experts(module) else ():
            if (w := quantized_stack(module, name)) is not None:
                layers[f"{path}.{name}"] = FrozenWeight(w, None)
    return layers


def _plain_state(model: nn.Module, layers: dict[str, FrozenWeight]) -> Iterator[tuple[str, Tensor, FrozenWeight | None]]:
    """(name, tensor, the layer whose weight or bias it stands for, or None) of the plain model: the state dict without what
    adapters and 4-bit storage add to it.
    """
    seen = set()
    plain = plain_names(model := unwrapped(model))
    offloaded = {plain(name): kept for name, kept in offloaded_tensors(model).items()}
    for name, value in plain_state_dict(model).items():
        owner = next((path for path in parents(name) if path in layers), None)
        if owner not in (None, name) and name.removeprefix(f"{owner}.") not in ("weight", "bias"):
            continue
        elsewhere = offloaded.get(name)  # accelerate gives tied ones one parameter
        layer, attribute = layers.get(owner or ""), "weight" if owner == name else name.rpartition(".")[2]
        place: object = (value.data_ptr() if elsewhere is None else id(elsewhere.tensor), value.shape, value.dtype)
        if changed := _is_changed(layer, attribute):  # no longer what it is tied to; one layer may be in several places
            place = id(layer), attribute
        if value.numel() and (changed or not (value.is_meta and elsewhere is None)) and place in seen:
            continue
        seen.add(place)
        if layer is not None and attribute == "bias" and _bias_term(layer) is None:
            layer = None
        yield name, value if elsewhere is None or layer is not None else elsewhere.load(), layer
        if layer is not None and attribute == "weight" and layer.bias is None and _bias_term(layer) is not None:
            yield f"{owner}.bias", value, layer


def _is_changed(layer: FrozenWeight | None, attribute: str) -> bool:
    """Whether the plain model's tensor is another than the layer's own, for the adapter in it."""
    if not isinstance(layer, AdaptedWeight) or layer.merged:
        return False
    return _bias_term(layer) is not None if attribute == "bias" else (layer.active_term or layer.initial_term) is not None


def _bias_term(layer: FrozenWeight) -> LowRankTerm | None:
    """The active adapter's low-rank term where it has a bias that is not merged."""
    term = layer.active_term if isinstance(layer, AdaptedWeight) and not layer.merged else None
    return None if term is None or term.bias is None else term


def _merged_bias(layer: FrozenWeight, dtype: torch.dtype | None) -> Tensor:
    """c + s·b of the active adapter."""
    term = _bias_term(layer)
    assert term is not None
    with onloaded(layer):
        bias = bias_sum(layer.bias, term.bias, term.scaling, layer.base_dtype)
    return bias.detach().to(dtype or (layer.base_dtype if layer.bias is None else layer.bias.dtype))  # type: ignore[union-attr]


def _merged_weight(layer: FrozenWeight, dtype: torch.dtype | None) -> Tensor:
    """W + s·B·A of the active adapter, DoRA's (m / n) ⊙ (W + s·B·A), as the plain layer stores it."""
    with onloaded(layer):
        W = layer.matrix
        if isinstance(layer, AdaptedWeight) and not layer.merged and (term := layer.active_term or layer.initial_term):
            W = layer.plus(term.A, term.B, term.scaling, term.magnitude)
        elif isinstance(W, NF4Weight):
            W = W.dequantize(dtype)
    return layer.stored(W.to(dtype or layer.base_dtype))


def unties(model: Any, written: Iterable[str]) -> bool:
    """Whether a transformers model's state dict with these names has every tensor that its configuration ties to another one:
    one with tie_word_embeddings would be tied again on loading, and lose an adapted head.

    Some ties stay, as T5's between its embeddings, whose configuration cannot say that the head alone has its own.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return bool(tied) and {*tied, *tied.values()} <= {*written}


def untie(config: Any) -> None:
    """Say in a transformers model's configuration, and in that of its text model, that the head has weights of its own."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def _save_configuration(model: nn.Module, directory: Path, dtype: torch.dtype | None, written: set[str]) -> None:
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        return
    config: Any = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if dtype is not None:
        config.dtype = dtype
    if unties(model, written):
        untie(config)
    config.save_pretrained(directory)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)
