"""MergeableWeight: W becomes W + s·B·A, or DoRA's (m / n) ⊙ (W + s·B·A), and is put back bit-exactly."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nf4 import NF4Weight
from .frozen_weight import FrozenWeight, apply_to_bytes
from .offload import keep_present_values, offloading_hooks, onloaded, restore_values


class LowRankTerm(NamedTuple):
    """What an adapter adds: s·B·A to the weight and, unless b is None, s·b to the bias. With m (DoRA), the weight's rows are
    scaled by m / n then.
    """

    A: Tensor
    B: Tensor
    scaling: float | Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None


class MergeableWeight(FrozenWeight):
    """A frozen weight and bias that a low-rank term can be merged into; the unmerged ones are put aside meanwhile."""

    def __init__(self, weight: nn.Parameter | NF4Weight, bias: nn.Parameter | None, **options: Any):
        super().__init__(weight, bias, **options)
        # empty while nothing is merged; a tuple hides a parameter from nn.Module
        self._unmerged: tuple[nn.Parameter | NF4Weight, ...] = ()
        self._unmerged_bias: tuple[nn.Parameter | None, ...] = ()
        self._unmerged_values: list[Mapping[str, Tensor]] = []  # from which accelerate's hooks load the unmerged ones

    @property
    def active_term(self) -> LowRankTerm | None:
        """The low-rank term to merge; None where there is none."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the active adapter is in the weight."""
        return bool(self._unmerged)

    def merge(self, term: LowRankTerm | None = None) -> float | None:
        """W + s·B·A, rounded once to W's dtype, becomes the weight; the unmerged one is kept, so unmerge() is bit-exact.
        term: instead of the active adapter's.
        c + s·b becomes the bias of an adapter with lora_bias. With a magnitude (DoRA) it is (m / n) ⊙ (W + s·B·A), the bias c.

        A 4-bit W is dequantised, added to and quantised again; the relative error of that, ‖new − (W + s·B·A)‖ / ‖W + s·B·A‖,
        is returned. The tensor that may be shared with other modules is not written to. Costs a second weight while merged, in
        the CPU's memory where accelerate offloads the weight.
        Raises RuntimeError if already merged, if no adapter is active, or if it has no values.
        """
        self._refuse_if_merged("merge again")
        term = self.active_term if term is None else term
        if term is None:
            raise RuntimeError("cannot merge: no adapter is active; call set_adapter(name) first")
        if term.A.is_meta and (offloading_hooks(self) or not self.weight.is_meta):
            raise RuntimeError("cannot merge: the adapter is on the meta device and has no values; do not offload it")
        weight, bias, error = self.weight, self.bias, None
        with onloaded(self):
            W, wanted, wanted_bias = self.matrix, self.plus(term.A, term.B, term.scaling, term.magnitude), self._plus_bias(term)
        if isinstance(W, NF4Weight):
            merged = self._requantize(wanted)
            self._hold(merged)
            size = torch.linalg.vector_norm(wanted).item()
            error = torch.linalg.vector_norm(wanted.sub_(merged.dequantize(wanted.dtype))).item() / (size or 1.0)
        else:
            self.weight = self.as_weight(wanted)
        self._unmerged = (W if isinstance(W, NF4Weight) else weight,)
        if term.bias is not None:
            self._unmerged_bias, self.bias = (bias,), wanted_bias
        self._unmerged_values = keep_present_values(self)
        return error

    def _plus_bias(self, term: LowRankTerm) -> nn.Parameter | None:
        """c + s·b in c's dtype, c itself where the term has no b."""
        if term.bias is None:
            return self.bias
        dtype = self.base_dtype if self.bias is None else self.bias.dtype
        merged = bias_sum(self.bias, term.bias, term.scaling, self.base_dtype).detach().to(dtype)  # type: ignore[union-attr]
        return nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """The weight as it was before merge(), the same Parameter, or the same codes.

        Raises RuntimeError if not merged, or if accelerate's hook keeps the merged weight together with the adapters.
        """
        if not self.merged:
            raise RuntimeError(f"cannot unmerge: {type(self).__name__} is not merged")
        if any(hook.place_submodules for hook in offloading_hooks(self)):
            raise RuntimeError(
                "cannot unmerge: accelerate's hook offloads the weight together with the adapters (place_submodules); "
                "remove the hook first"
            )
        (weight,), self._unmerged = self._unmerged, ()
        if isinstance(weight, NF4Weight):
            self._hold(weight)
        else:
            self.weight = weight
        if self._unmerged_bias:
            (self.bias,), self._unmerged_bias = self._unmerged_bias, ()
        restore_values(self, self._unmerged_values)
        self._unmerged_values = []

    def _refuse_if_merged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(f"cannot {action}: {type(self).__name__} is merged; call unmerge() first")

    def check_state(self, state_dict: Any, prefix: str) -> NF4Weight | None:
        """Raises RuntimeError while merged too: what was loaded would be lost at unmerge(), or not be what is merged."""
        if any(name.startswith(prefix) for name in state_dict):
            self._refuse_if_merged("load a state dict")
        return super().check_state(state_dict, prefix)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergeableWeight":
        super()._apply(fn, recurse)
        moved: list[nn.Parameter | NF4Weight] = []
        for weight in self._unmerged:
            if isinstance(weight, NF4Weight):
                weight = weight.with_tensors(**{name: apply_to_bytes(fn, t) for name, t in weight.tensors().items()})
            else:
                weight.data = fn(weight.data)
            moved.append(weight)
        self._unmerged = tuple(moved)
        for bias in self._unmerged_bias:
            if bias is not None:
                bias.data = fn(bias.data)
        return self


def bias_sum(
    bias: Tensor | None, lora_bias: Tensor | None, scaling: float | Tensor, weight_dtype: torch.dtype
) -> Tensor | None:
    """c + s·b, in a dtype at least as wide as b's: b's gradient is then not rounded to a 16-bit weight's. None for neither."""
    if lora_bias is None:
        return bias
    scaled = (lora_bias * scaling).to(torch.promote_types(lora_bias.dtype, weight_dtype))
    return scaled if bias is None else scaled + bias
