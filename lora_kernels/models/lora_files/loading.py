"""One file of an adapter, of any tool, as what add_lora takes: for each part of a model a LoRAConfig and PEFT's tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import adapter_config
from ..config import LoRAConfig
from .adapters import config_of, paths_in, rescaled, tensors_of
from .factors import Factors, Module, check_values, modules_of
from .keys import CONFIGS
from .parts import ALONE, own_name
from .places import placed
from .reading import read_file


class LoRAFile(NamedTuple):
    """A file by module, under the names that it has."""

    format: str
    modules: dict[Module, Factors]
    metadata: dict[str, str]
    tensors: Mapping[str, Tensor]  # under the file's own keys


class PartAdapter(NamedTuple):
    """What a file has for a part of a model."""

    config: LoRAConfig
    tensors: dict[str, Tensor]  # under PEFT's keys
    format: str
    metadata: dict[str, str]


def read_lora_file(path: Path) -> LoRAFile:
    """Raises FileNotFoundError or ValueError that names the file, and the key where there is one."""
    tensors, metadata = read_file(path)
    try:
        modules = modules_of(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return LoRAFile(" and ".join(sorted({module.format for module in modules})), modules, metadata, tensors)


def factors_by_part(
    path: Path, file: LoRAFile, parts: Mapping[str, nn.Module], pipeline: object
) -> dict[str, dict[str, Factors]]:
    """The file's factors by part and path in it, with the scalings that its header says.

    Raises ValueError that names `path` for what fits no part.
    """
    try:
        meant = sorted({module.part for module in file.modules})
        if ALONE in parts and len(meant) > 1:
            raise ValueError(
                f"it has adapters for {meant}, and one model is here: pass the pipeline, or its parts, as in "
                '{"unet": unet, "text_encoder": text_encoder}'
            )
        found = {
            part: configured(file, own_name(part, parts[part], factors), parts[part], factors)
            for part, factors in placed(file.modules, parts, pipeline).items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_values(path, file.tensors)
    return found


def read_adapter(path: Path, parts: Mapping[str, nn.Module], pipeline: object) -> dict[str, PartAdapter]:
    """The adapter of a file for each of the parts that it has one for.

    pipeline: what the parts are of, which may have diffusers' lora_state_dict. Raises ValueError that names file and key.
    """
    file = read_lora_file(path)
    adapters: dict[str, PartAdapter] = {}
    for part, factors in factors_by_part(path, file, parts, pipeline).items():
        try:
            config = config_of(factors, paths_in(parts[part]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        adapters[part] = PartAdapter(config, tensors_of(factors), file.format, file.metadata)
    return adapters


def configured(file: LoRAFile, part: str, model: nn.Module, factors: dict[str, Factors]) -> dict[str, Factors]:
    """With the alphas of diffusers' LoraConfigs in the header, where it has one for the part, a pipeline's name."""
    values = _configuration(file.metadata, part)
    if not values or any(each.own_alpha for each in factors.values()):
        return factors
    given = {name: value for name, value in values.items() if name not in ("modules_to_save", "bias", "target_modules")}
    config = adapter_config.from_peft(
        {"peft_type": "LORA", **given, "target_modules": sorted(factors)}, model, f"its {CONFIGS}"
    )
    return rescaled(factors, config)


def _configuration(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """The fields of a part's LoraConfig; {} where the header has none."""
    if CONFIGS not in metadata:
        return {}
    values = adapter_config.parsed(metadata[CONFIGS], f"its header's {CONFIGS}")
    own = {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}
    return own or {name: value for name, value in values.items() if "." not in name}  # of a model that was saved alone
