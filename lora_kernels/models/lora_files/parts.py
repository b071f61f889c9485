"""The models that a file's adapter is for: one model, or the parts of a pipeline by their names in it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .keys import DENOISER

ALONE = ""  # the name of a model that is no part of a pipeline
DENOISERS = ("unet", "transformer")
UNET_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
OTHERWISE = {
    "text_encoder_3": "text_encoder_2"
}  # FLUX's T5, the third of sd-scripts' and ComfyUI's names, is a pipeline's second


def parts_of(model: Any) -> dict[str, nn.Module]:
    """{ALONE: model}, the modules of a diffusers pipeline, or a dict of modules as it is. Raises TypeError for others."""
    if isinstance(model, nn.Module):
        return {ALONE: model}
    components = getattr(model, "components", model)
    if isinstance(components, Mapping):
        parts = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
        if parts and (components is not model or len(parts) == len(components)):
            return parts
    raise TypeError(
        f"model: got {type(model).__name__}, expected an nn.Module, a diffusers pipeline, or its parts, as in "
        '{"unet": unet, "text_encoder": text_encoder}'
    )


def part_for(wanted: str, parts: Mapping[str, nn.Module]) -> str:
    """The name in `parts` of the part that a file means. Raises ValueError if it is not there."""
    if ALONE in parts:
        return ALONE
    names = DENOISERS if wanted == DENOISER else (wanted, OTHERWISE.get(wanted))
    found = next((name for name in names if name in parts), None)
    if found is None:
        raise ValueError(f"it is for the {wanted}, and the parts here are {sorted(parts)}")
    return found


def own_name(part: str, model: nn.Module | None, paths: Iterable[str]) -> str:
    """What a pipeline calls a part: of a model that stands alone, what its class and the paths of its adapted layers say."""
    if part not in (ALONE, DENOISER):
        return part
    if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
        return "text_encoder"
    return "unet" if any(path.startswith(UNET_BLOCKS) for path in paths) else "transformer"
