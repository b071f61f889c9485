"""The change of class between PEFT's LoRA layers and their accelerated forms; importing this needs peft."""

import sys
import warnings
from typing import Any

from peft.tuners import adalora, lora

from ...layers import offload
from ...layers.offload import forward_is_replaced, hooks_call_the_class_s
from . import experts, refusals
from .conv2d import AcceleratedConv2d
from .embedding import AcceleratedEmbedding
from .linear import CALLS, AcceleratedLinear
from .not_linear import NotLinear
from .parts import LOW_RANK_DROPOUT
from .svd_linear import AcceleratedSVDLinear


def classes() -> dict[type, type]:
    """PEFT's classes and ours."""
    found: dict[type, type] = {
        lora.Linear: AcceleratedLinear,
        adalora.SVDLinear: AcceleratedSVDLinear,
        lora.ParamWrapper: experts.ParamWrapper,
        lora.Conv2d: AcceleratedConv2d,
        lora.Embedding: AcceleratedEmbedding,
    }
    bnb = sys.modules.get("peft.tuners.lora.bnb")  # PEFT imports it before it makes such a layer
    if hasattr(bnb, "Linear4bit"):
        from .linear_4bit import AcceleratedLinear4bit

        found[bnb.Linear4bit] = AcceleratedLinear4bit  # type: ignore[union-attr]
    bnb = sys.modules.get("peft.tuners.adalora.bnb")
    if hasattr(bnb, "SVDLinear4bit"):
        from .svd_linear_4bit import AcceleratedSVDLinear4bit

        found[bnb.SVDLinear4bit] = AcceleratedSVDLinear4bit  # type: ignore[union-attr]
    return found


def shown(kind: type) -> str:
    """A class of PEFT's layers by the name that it prints."""
    return f"{'adalora' if issubclass(kind, adalora.layer.AdaLoraLayer) else 'lora'}.{kind.__name__}"


def swap(layer: Any, dora_dropout: str) -> str | None:
    """Change a layer of PEFT's into ours, if it is not one yet; the reason why it cannot be."""
    known = classes()
    if type(layer) not in known and type(layer) not in known.values():
        return f"a {shown(type(layer))}; {' and '.join(map(shown, known))} can be"
    if isinstance(layer, lora.ParamWrapper) and (reason := experts.why_not_experts(layer)) is not None:
        return reason
    ours = known.get(type(layer), type(layer))
    if forward_is_replaced(layer) and not hooks_call_the_class_s(layer):
        reason = "its forward was replaced on the instance, and the replacement does not call the class's forward"
        warnings.warn(f"lora_kernels.accelerate: a {type(layer).__name__} is left as it is: {reason}", stacklevel=3)
        return reason
    change_class(layer, ours)
    vars(layer).pop(LOW_RANK_DROPOUT, None)
    if dora_dropout == "low_rank":
        vars(layer)[LOW_RANK_DROPOUT] = True
    return None


def why_not_at_present(layer: Any) -> str | None:
    """Why every call of an accelerated layer goes to PEFT's own forward as long as the layer is as it is now."""
    if isinstance(layer, NotLinear):
        return layer.why_not()
    return (experts if isinstance(layer, lora.ParamWrapper) else refusals).why_not_at_present(layer)


def change_class(layer: Any, new: Any) -> None:
    """Give `layer` the class `new`, and nothing of ours."""
    if type(layer) is not new:
        offload.change_class(layer, new)
        for name in (CALLS, LOW_RANK_DROPOUT):
            vars(layer).pop(name, None)
