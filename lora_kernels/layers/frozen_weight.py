"""FrozenWeight: how a layer owns its base weight W[out, in]: dense, dense and transposed, or in 4 bits.

A 4-bit weight keeps bitsandbytes' names: parameter `weight` is the packed codes (uint8[·, 1]), and its state-dict keys are
those that bitsandbytes and transformers write. Its other tensors are buffers, which `.to(dtype)` does not cast.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import without_autocast
from ..functional.nf4 import quantize
from ..nf4 import NF4Weight
from ..nf4.state_dict import from_state, to_state
from ..nf4.storage import as_bytes, as_storage
from ..reference.magnitude import over
from .offload import give_hook, offloading_hooks

BUFFERS = ("absmax", "nested_absmax", "nested_map", "nested_offset")  # of NF4Weight, here with the prefix "_weight_"
BUFFER_NAMES = tuple(f"_weight_{name}" for name in BUFFERS)


@dataclass(frozen=True)
class NF4Format:
    """What describes a 4-bit weight beside its tensors; `storage` is the dtype as which its codes are written."""

    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    storage: torch.dtype = torch.uint8


class FrozenWeight(nn.Module):
    """Owns `weight` and `bias`; `matrix` is W[out_features, in_features], of `shape`, a Tensor or an NF4Weight.

    fan_in_fan_out: a dense weight is stored as [in, out], as in transformers' Conv1D. W may be a stack [E, out, in].
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter | NF4Weight,
        bias: nn.Parameter | None,
        *,
        fan_in_fan_out: bool = False,
        storage: torch.dtype = torch.uint8,
    ):
        super().__init__()
        self.fan_in_fan_out = fan_in_fan_out
        self._format: NF4Format | None = None
        for name in BUFFERS:
            self.register_buffer(f"_weight_{name}", None, persistent=False)
        if isinstance(weight, NF4Weight):
            self.weight = nn.Parameter(weight.codes[:, None], requires_grad=False)
            self._hold(weight, storage)
            shape = weight.shape
        else:
            self.weight = weight
            matrix = weight.flatten(1) if weight.ndim == 4 else weight  # a convolution's
            shape = matrix.mT.shape if fan_in_fan_out else matrix.shape
        self.shape = shape
        self.out_features, self.in_features = shape[-2:]
        self.bias = bias
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    @property
    def quantized(self) -> bool:
        """Whether the weight is in 4 bits."""
        return self._format is not None

    @property
    def matrix(self) -> Tensor | NF4Weight:
        """W[out_features, in_features], whatever the layout of `weight`."""
        if self._format is None:
            return self.weight.mT if self.fan_in_fan_out else self.weight
        form, own = self._format, self._buffers  # nn.Module's own look-up takes a µs for each
        tensors = [own[name] for name in BUFFER_NAMES]
        return NF4Weight(self.weight.view(-1), *tensors, form.shape, form.dtype, form.blocksize, form.quant_type)  # type: ignore

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the weight, in 4 bits that of the weight that was quantised."""
        return self.weight.dtype if self._format is None else self._format.dtype

    @property
    def storage(self) -> torch.dtype:
        """The dtype as which the weight is written: its own, or that of bitsandbytes' quant_storage."""
        return self.weight.dtype if self._format is None else self._format.storage

    def _hold(self, w: NF4Weight, storage: torch.dtype | None = None) -> None:
        """Make `w` the weight, without copying; `weight` stays a parameter of its own if its bytes are others."""
        if storage is None:
            storage = torch.uint8 if self._format is None else self._format.storage
        if self.weight.data_ptr() != w.codes.data_ptr() or self.weight.dtype != torch.uint8 or self.weight.is_meta:
            self.weight = nn.Parameter(w.codes[:, None], requires_grad=False)
        for name in BUFFERS:
            setattr(self, f"_weight_{name}", getattr(w, name))
        self._format = NF4Format(w.shape, w.dtype, w.blocksize, w.quant_type, storage)

    def _requantize(self, matrix: Tensor) -> NF4Weight:
        """A dense W in this layer's 4-bit format."""
        form = self._format
        assert form is not None
        w = quantize(matrix, form.quant_type, form.blocksize, self._weight_nested_absmax is not None)
        return replace(w, dtype=form.dtype)

    @torch.no_grad()
    def plus(self, A: Tensor, B: Tensor, scaling: float | Tensor, magnitude: Tensor | None = None) -> Tensor:
        """W + s·B·A[out, in], or with a magnitude (m / n) ⊙ (W + s·B·A), in float32 or wider, under autocast too."""
        W = self.matrix
        with without_autocast(W.device):
            if isinstance(W, NF4Weight):
                total = W.dequantize(torch.float32)
                (total.addmm_ if W.ndim == 2 else total.baddbmm_)(B.float(), A.float() * scaling)
            else:
                wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
                total = W.to(wide) + scaling * (B.to(wide) @ A.to(wide))
            if magnitude is None:
                return total
            return total.mul_(over(magnitude, torch.linalg.vector_norm(total, dim=1))[:, None])

    def as_weight(self, matrix: Tensor) -> nn.Parameter:
        """W[out, in] as a dense `weight` of this layer."""
        return nn.Parameter(self.stored(matrix.to(self.base_dtype)), requires_grad=self.weight.requires_grad)

    def stored(self, matrix: Tensor) -> Tensor:
        """W[out, in] in the layout of a dense `weight`."""
        return matrix.mT.contiguous() if self.fan_in_fan_out else matrix.contiguous()

    # ---- moving ----

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenWeight":
        held = {name: self._buffers[f"_weight_{name}"] for name in BUFFERS}
        for name in BUFFERS:
            self._buffers[f"_weight_{name}"] = None
        try:
            super()._apply(fn, recurse)
            held = {name: None if t is None else apply_to_bytes(fn, t) for name, t in held.items()}
        finally:
            for name, tensor in held.items():
                self._buffers[f"_weight_{name}"] = tensor
        return self

    # ---- state dict ----

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        w = self.matrix
        if isinstance(w, NF4Weight) and self._format is not None:
            if self._format.storage != torch.uint8:
                destination[f"{prefix}weight"] = as_storage(w.codes, self._format.storage)
            destination.update({f"{prefix}weight.{name}": tensor for name, tensor in to_state(w).items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        """A 4-bit state makes the layer 4-bit; a dense one is quantised where the layer is. A state that does not fit raises
        ValueError before anything of the layer changes.
        """
        weight, key, storage = self.check_state(state_dict, prefix), f"{prefix}weight", None
        if weight is not None:
            storage = state_dict[key].dtype
            if not local_metadata.get("assign_to_params_buffers", False):
                weight = copy_to(weight, self.weight.device)
        elif self.quantized and key in state_dict:
            weight = self._requantize(state_dict[key].mT if self.fan_in_fan_out else state_dict[key]).to(self.weight.device)
        if weight is not None:
            self._hold(weight, storage)
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(f"{key}.")}
            state_dict[key] = self.weight.data
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def check_state(self, state_dict: Any, prefix: str) -> NF4Weight | None:
        """The 4-bit weight that a state dict has for this layer. Raises ValueError, naming the key, if it does not fit."""
        key = f"{prefix}weight"
        beside = {name.removeprefix(f"{key}."): value for name, value in state_dict.items() if name.startswith(f"{key}.")}
        if key not in state_dict or not (beside or self.quantized) or (not beside and self._is_dense(state_dict[key])):
            return None
        self._check_loadable()
        w = from_state(state_dict[key], beside, key)
        if w.shape != self.shape:
            raise ValueError(f"{key}: got a 4-bit weight of shape {tuple(w.shape)}, expected {tuple(self.shape)}")
        return w

    def _is_dense(self, weight: Tensor) -> bool:
        """Whether a state dict's `weight` is this layer's in floating point."""
        shape = (*self.shape[:-2], *self.shape[:-3:-1]) if self.fan_in_fan_out else self.shape
        return weight.is_floating_point() and weight.shape == shape

    def _check_loadable(self) -> None:
        """Raise RuntimeError if a 4-bit weight cannot be put here."""
        if offloading_hooks(self):
            raise RuntimeError(
                "cannot load a 4-bit weight: accelerate offloads this layer's, and its hook would go on loading that; "
                "load the state before the model is dispatched"
            )


def apply_to_bytes(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn as of nn.Module._apply, which moves and maybe casts, on the tensor's bytes: those it cannot cast."""
    return fn(as_bytes(tensor.reshape(-1))).view(tensor.dtype).view(tensor.shape)


def copy_to(w: NF4Weight, device: torch.device) -> NF4Weight:
    """A copy of w on `device` that shares nothing with it."""
    return w.with_tensors(**{name: tensor.to(device, copy=True) for name, tensor in w.tensors().items()})


def is_linear4bit(module: nn.Module) -> bool:
    """Whether it is exactly bitsandbytes' Linear4bit, LinearNF4 or LinearFP4."""
    kind = type(module)
    return kind.__name__ in ("Linear4bit", "LinearNF4", "LinearFP4") and kind.__module__.startswith("bitsandbytes.")


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is exactly transformers' Conv1D, a linear layer that stores its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def without_weight(linear: nn.Module) -> nn.Module:
    """The same layer without its tensors, which would otherwise stay alive."""
    shell = copy.copy(linear)
    shell._parameters = dict.fromkeys(linear._parameters)
    give_hook(linear, shell)  # for the copied forward is bound to `linear`
    if is_linear4bit(shell):
        shell.quant_state = None  # type: ignore[assignment]
    return shell
