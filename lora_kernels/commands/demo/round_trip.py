"""The demo's adapter written and read back: by this package, and by PEFT, into base models read from disk again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.adapter_files import load_adapter
from ...models.adapter_saving import WEIGHTS_FILE, save_adapter
from ...models.blocks import fuse_blocks
from ...models.state import lora_layers
from ...models.switching import set_adapter
from .. import pretrained
from ..model_step import peft_base
from .settings import Settings


@torch.no_grad()
def round_trip(model: nn.Module, directory: Path, ids: Tensor, settings: Settings) -> dict[str, Any]:
    """Write the adapter in PEFT's format, and require the logits of `ids` again from both readers.

    This package's are the same bit for bit. PEFT multiplies in another order, so that its logits are equal to rounding:
    `_allowed` says to how much of it. Raises RuntimeError.
    """
    save_adapter(model, settings.output)
    first = next(model.parameters())
    expected = _logits(model, ids)

    fresh = pretrained.load_model(directory, first.dtype, first.device)
    load_adapter(fresh, settings.output, quantize=settings.quantize)
    fuse_blocks(fresh)  # as the trained model's are: alone, layers round in another order
    logits = _logits(fresh, ids)
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max().item()
        raise RuntimeError(
            f"adapter round trip: logits differ by up to {difference:.3g} with {settings.output} read back, expected 0"
        )
    set_adapter(fresh, None)
    base = _logits(fresh, ids)
    del fresh
    by_peft = _relative(_peft_logits(directory, ids, settings, first), expected)
    without = _relative(base, expected)
    four_bit = any(layer.quantized for layer in lora_layers(model).values())  # those of the directory too
    allowed = _allowed(torch.bfloat16 if four_bit else first.dtype, without)
    if not by_peft <= allowed:
        raise RuntimeError(
            f"adapter round trip: PEFT's logits differ by {by_peft:.3g} with {settings.output}, expected at most {allowed:.3g}"
        )
    return {
        "adapter": str(settings.output),
        "adapter_bytes": (settings.output / WEIGHTS_FILE).stat().st_size,
        "logits_bit_equal": True,
        "peft_relative_difference": by_peft,
        "peft_allowed_difference": allowed,
        "base_relative_difference": without,
    }


def _allowed(rounded: torch.dtype, without: float) -> float:
    """The most that PEFT's logits may differ, over their norm; `without`: what those without the adapter differ.

    √ε, and a tenth of `without`, for an adapter that PEFT ignored must not pass; but no less than ε^¾, which rounding alone may
    reach: below it nothing can be told. rounded: bfloat16 over 4-bit weights, whose absmax bitsandbytes may round to it.
    """
    epsilon = torch.finfo(rounded).eps
    return min(epsilon**0.5, max(without / 10, epsilon**0.75))


def _peft_logits(directory: Path, ids: Tensor, settings: Settings, like: Tensor) -> Tensor:
    from peft import PeftModel

    base = peft_base(pretrained.load_model(directory, like.dtype, like.device), settings.quantize)
    return _logits(PeftModel.from_pretrained(base, settings.output), ids)


def _logits(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def _relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return ((found - expected).float().norm() / expected.float().norm()).item()
