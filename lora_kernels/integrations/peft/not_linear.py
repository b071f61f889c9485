"""The forward of PEFT's layers that are not linear, accelerated: where there is a reason against it, PEFT's own computes."""

from typing import Any

import torch
from torch import Tensor

from ...dtypes import FLOATS
from ...plan import PLAIN
from .linear import FAST, Shown, count
from .parts import NONE_ACTIVE


class NotLinear(Shown):
    """It stands before PEFT's class in the order of methods, and a class made of it has `_why_not_adapter` and `_computed`."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = "extra arguments" if args or kwargs else self.why_not() or self._why_not_input(x, self._active())
        count(self, reason or FAST)
        return self._computed(x, self._active()) if reason is None else super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def why_not(self: Any) -> str | None:
        """The reason in the layer's present state why PEFT's own forward has to compute."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged_adapters:
            return "adapters are merged"
        if (name := self._active()) is None:
            known = [name for name in self.active_adapters if name in self.scaling]
            return "several active adapters" if known else NONE_ACTIVE
        if name in self.lora_variant:
            return f"the variant {type(self.lora_variant[name]).__name__}"
        if not isinstance(self.scaling[name], (int, float)):
            return f"scaling is a {type(self.scaling[name]).__name__}"
        return self._why_not_adapter(name)

    def _active(self: Any) -> str | None:
        """The one active adapter that the layer has."""
        found = [name for name in self.active_adapters if name in self.scaling]
        return found[0] if len(found) == 1 else None


def why_not_tensors(*tensors: Tensor | None) -> str | None:
    """A reason in tensors that are computed with, None among them left out."""
    present = [t for t in tensors if t is not None]
    for t in present:
        if type(t) not in PLAIN:
            return f"a {type(t).__name__} among the tensors"
        if t.dtype not in FLOATS:
            return f"a tensor of {t.dtype}"
        if t.device != present[0].device:
            return "tensors on different devices"
    return "torch.func transforms" if torch._C._are_functorch_transforms_active() else None
