"""Other codebases' names, such as SDXL's input_blocks_4_1 and FLUX's double_blocks_0_img_attn_qkv, by diffusers' converters.

These rename keys, split and swap rows, and scale, each in its own way. They are given numbered rows in place of a file's
tensors, and what becomes of the numbers says which rows go where: scales, magnitudes and ranks are then the file's own, and
what a converter drops in silence is missed.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..wrappers import unwrapped
from .factors import Factors, Module
from .keys import UP, parse

# of linear1, which diffusers splits by the sizes of the released FLUX, whatever the model's: q, k, v and the MLP
FLUX_ROWS = 3 * 3072 + 12288
KOHYA_ENDS = (".lora_down.weight", ".lora_up.weight")


class Found(NamedTuple):
    """A module that a foreign name means: its path, and which of the rows that diffusers was asked about are its."""

    path: str
    rows: Tensor
    asked: int


def renamed(
    foreign: Mapping[Module, Factors], model: nn.Module, find: Callable[[str], str | None], pipeline: object
) -> dict[Module, list[Found]]:
    """What each of `foreign` means in `model`, in the order of rows; nothing for what diffusers does not know.

    Raises ValueError where diffusers is missing, or has no converter for such a model.
    """
    if not foreign:
        return {}
    key = next(iter(foreign.values())).key
    convert = _converter(model, pipeline, key)
    found: dict[Module, list[Found]] = {}
    errors: list[str] = []
    for spell in (_as_in_the_file, _as_kohya):
        left = {module: factors for module, factors in foreign.items() if module not in found}
        if left:
            try:
                found |= _ask(convert, left, spell, find)
            except Exception as error:  # of names it does not know: whatever an untested path of a converter raises
                errors.append(f"{type(error).__name__}: {error}")
    if errors and len(found) < len(foreign):
        key = next(factors.key for module, factors in foreign.items() if module not in found)
        raise ValueError(f"{key!r}: no module here has its name, and diffusers does not know it: {errors[0][:300]}")
    return found


def _as_in_the_file(module: Module, factors: Factors) -> tuple[str, tuple[str, str], bool]:
    return module.base, factors.ends, factors.own_alpha


def _as_kohya(module: Module, factors: Factors) -> tuple[str, tuple[str, str], bool]:
    return f"lora_unet_{module.name.replace('.', '_')}", KOHYA_ENDS, True


def _ask(
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    foreign: Mapping[Module, Factors],
    spell: Callable[[Module, Factors], tuple[str, tuple[str, str], bool]],
    find: Callable[[str], str | None],
) -> dict[Module, list[Found]]:
    asked: dict[str, Tensor] = {}
    modules, sizes, starts, start = list(foreign), [], [], 1
    for module, factors in foreign.items():
        base, (down, up), alpha = spell(module, factors)
        size = FLUX_ROWS if base.endswith("linear1") and "single_blocks" in base else factors.B.shape[0]
        asked[base + down] = torch.ones(1, 1, dtype=torch.float64)  # of rank 1 and alpha 1: no scale
        asked[base + up] = torch.arange(start, start + size, dtype=torch.float64).view(-1, 1)
        if alpha:
            asked[f"{base}.alpha"] = torch.tensor(1.0)
        sizes.append(size)
        starts.append(start)
        start += size
    found: dict[Module, list[Found]] = {}
    for key, rows in convert(asked).items():
        *_, name, base, kind = parse(key)
        path = find(name) or find(base)
        if kind != UP or path is None:
            continue
        numbers = rows.flatten().long()
        number = int(torch.searchsorted(torch.tensor(starts), numbers[:1], right=True)) - 1
        found.setdefault(modules[number], []).append(Found(path, numbers - starts[number], sizes[number]))
    whole = {module: sorted(spots, key=lambda spot: int(spot.rows.min())) for module, spots in found.items()}
    lost = [m for m, size in zip(modules, sizes, strict=True) if m in whole and not _covers(whole[m], size)]
    return {module: spots for module, spots in whole.items() if module not in lost}


def _covers(spots: list[Found], size: int) -> bool:
    """Whether every row is somewhere, once."""
    return torch.equal(torch.cat([spot.rows for spot in spots]).sort().values, torch.arange(size))


def _converter(model: nn.Module, pipeline: object, key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """diffusers' lora_state_dict for such a model, with PEFT's keys in what it gives."""
    plain, no = unwrapped(model), f"{key!r}: no module of {type(unwrapped(model)).__name__} has its name"
    homes = {kind.__module__.partition(".")[0] for kind in type(plain).__mro__}
    if "transformers" in homes and importlib.util.find_spec("diffusers"):
        return _old_text_encoder
    if "diffusers" not in homes:
        raise ValueError(f"{no}; expected a name made of its modules' paths")
    loader: Any = type(pipeline) if hasattr(type(pipeline), "lora_state_dict") else _loader(type(plain).__name__)
    if loader is None:
        raise ValueError(f"{no}, and diffusers has no LoRA loader for it by its class; pass the whole pipeline")
    utils: Any = importlib.import_module("diffusers.utils")
    options = {"unet_config": plain.config} if type(plain).__name__.startswith("UNet") else {}

    def convert(asked: dict[str, Tensor]) -> dict[str, Tensor]:
        result = loader.lora_state_dict(dict(asked), **options)
        return utils.convert_unet_state_dict_to_peft(result[0] if isinstance(result, tuple) else result)

    return convert


def _old_text_encoder(asked: dict[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's keys for to_q_lora and its like, diffusers' names of a text encoder's layers before it used PEFT."""
    utils: Any = importlib.import_module("diffusers.utils.state_dict_utils")
    return utils.convert_state_dict_to_peft(asked, original_type=utils.StateDictType.DIFFUSERS_OLD)


def _loader(model: str) -> Any:
    """The mixin of diffusers' pipelines for a class of models: they are named alike."""
    kind = "StableDiffusionXL" if model.startswith("UNet") else model.partition("Transformer")[0]
    return getattr(importlib.import_module("diffusers.loaders.lora_pipeline"), f"{kind}LoraLoaderMixin", None)
