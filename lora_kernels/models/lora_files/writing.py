"""One file of an adapter in another tool's keys, from the factors of each part."""

import dataclasses
import json
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..adapter_keys import KEYS
from .adapters import config_of, paths_in
from .factors import Factors, Module
from .foreign_names import renamed
from .keys import CONFIGS, DENOISER, DIFFUSERS, KOHYA
from .places import Index, flat

FORMATS = (DIFFUSERS, KOHYA)
HASHES = "sshs_"  # kohya's, of the tensors of the file that was read
DIFFUSERS_KINDS = tuple(KEYS.values())
TEXT_ENCODER_KINDS = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", *DIFFUSERS_KINDS[2:])
Parts = Mapping[str, Mapping[str, Factors]]  # by a pipeline's name of the part, and path


def written(
    parts: Parts, format: str, metadata: Mapping[str, str], models: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a file; models: of the parts, as far as they are here. Raises ValueError for what it cannot hold."""
    if format == KOHYA:
        return _kohya_file(parts, models), _header(metadata)
    paths = {part: paths_in(models[part]) if part in models else list(factors) for part, factors in parts.items()}
    return _diffusers_file(parts, metadata, paths)


def _diffusers_file(
    parts: Parts, metadata: Mapping[str, str], paths: Mapping[str, Collection[str]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) as diffusers' save_lora_weights writes them, with the parts' LoraConfigs in the header.

    paths: of a part's modules, that names in its LoraConfig are not to mean. Text encoders have the keys from before PEFT, the
    only ones that diffusers tells apart there.
    """
    tensors: dict[str, Tensor] = {}
    configs: dict[str, object] = {}
    for part, factors in parts.items():
        kinds = TEXT_ENCODER_KINDS if part.startswith("text_encoder") else DIFFUSERS_KINDS
        for path, each in factors.items():
            own = zip(kinds, (each.A, each.B, each.bias, each.magnitude), strict=True)
            tensors |= {f"{part}.{path}.{kind}": tensor for kind, tensor in own if tensor is not None}
        config = {"peft_type": "LORA", **dataclasses.asdict(config_of(factors, paths[part]))}
        configs |= {f"{part}.{name}": value for name, value in config.items()}
    return _separate(tensors), _header(metadata) | {CONFIGS: json.dumps(configs, sort_keys=True)}


def _kohya_file(parts: Parts, models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors as sd-scripts and LyCORIS name them, after the model's own paths; alpha is in every layer."""
    tensors: dict[str, Tensor] = {}
    for part, factors in parts.items():
        prefix = _kohya_prefix(part, parts, factors, models.get(part))
        for path, each in factors.items():
            if each.bias is not None:
                raise ValueError(f"{path}: its adapter has a bias (lora_bias), which kohya's files cannot hold; use diffusers'")
            # transformers' CLIPTextModel has its layers without the text_model that these names begin with
            name = f"text_model.{path}" if part.startswith("text_encoder") and path.startswith("encoder.layers.") else path
            own = {"lora_down.weight": each.A, "lora_up.weight": each.B, "alpha": _number(each.alpha)}
            if each.magnitude is not None:
                own["dora_scale"] = each.magnitude.view(-1, *[1] * (each.A.dim() - 1))
            tensors |= {f"{prefix}{flat(name)}.{kind}": tensor for kind, tensor in own.items()}
    return _separate(tensors)


def _kohya_prefix(part: str, parts: Parts, factors: Mapping[str, Factors], model: nn.Module | None) -> str:
    if part.startswith("text_encoder"):
        alone = not any(other.startswith("text_encoder_") for other in parts)
        return "lora_te_" if alone else f"lora_te{part.removeprefix('text_encoder').removeprefix('_') or 1}_"
    return "lora_unet_" if part == "unet" or (model is not None and _reads_back(model, factors)) else "lora_transformer_"


def _reads_back(model: nn.Module, factors: Mapping[str, Factors]) -> bool:
    """Whether diffusers leads lora_unet_ and a transformer's flattened paths back to these paths, as it does Z-Image's.

    Others' have OneTrainer's prefix, lora_transformer_, with which FLUX's are read by diffusers, and most by ComfyUI.
    """
    modules = {Module(KOHYA, DENOISER, flat(path), f"lora_unet_{flat(path)}"): each for path, each in factors.items()}
    own = Index.of(model).modules
    try:
        found = renamed(modules, model, lambda name: name if name in own else None, None)
    except ValueError:
        return False
    return all([spot.path for spot in found.get(module, ())] == [path] for module, path in zip(modules, factors, strict=True))


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies: safetensors refuses tensors that share memory, as q, k and v that were one in a file share A."""
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _header(metadata: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in metadata.items() if name != CONFIGS and not name.startswith(HASHES)}
    return {"format": "pt", **kept}


def _number(alpha: float) -> Tensor:
    """float32 as these tools write it, float64 where that would round."""
    narrow = torch.tensor(alpha, dtype=torch.float32)
    return narrow if narrow.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
