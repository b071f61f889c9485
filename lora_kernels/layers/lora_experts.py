"""LoRAExperts: an experts module of transformers whose stacks of weights have named adapters, each stack a LoRAStack."""

import copyreg
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.nf4 import quantize_nf4
from ..nf4 import NF4Weight
from ..values import LoRAAdapter
from .adapters import AdaptedWeight, Adapter
from .experts import experts_forward, sizes, stacked, weight_names
from .experts_4bit import put_quantized, quantized_stack, why_not_4_bit, without_parametrizations
from .merging import LowRankTerm
from .offload import change_class

BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")  # keys of a 4-bit stack begin so


def check_stacks(target_parameters: object, init_lora_weights: bool | str, **options: bool) -> None:
    """Raise TypeError or ValueError for options of an adapter that stacks of experts, as PEFT has them, lack."""
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters: got {target_parameters!r}, expected a list of names")
    for name, value in options.items():
        if value:
            raise ValueError(f"{name}: got True, expected False with target_parameters: experts have no such term in PEFT")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f'init_lora_weights: got {init_lora_weights!r}, expected True, False or "gaussian" with target_parameters'
        )


class LoRAStack(AdaptedWeight):
    """W[E, out, in] of E experts with named adapters: `lora_A[name]` [E·r, in], `lora_B[name]` [out, r·E], laid out as PEFT's.

    A child of its experts module in the place of the parameter `weight`, whose name in a state dict stays what it was. In 4
    bits the keys beside it are bitsandbytes': `gate_up_proj` has the codes, `gate_up_proj.absmax` and so on what they mean.
    """

    def __init__(self, weight: nn.Parameter | NF4Weight, is_transposed: bool, storage: torch.dtype | None = None):
        """storage: of bitsandbytes' codes, where `weight` is a stack that it has quantised, and is to have back."""
        super().__init__(weight, None, fan_in_fan_out=is_transposed, storage=storage or torch.uint8)
        self.stack, self.is_bitsandbytes = weight.shape[0], storage is not None

    @property
    def active_term(self) -> LowRankTerm | None:
        """A[E, r, in] and B[E, out, r] of the active adapter; None where no adapter is active."""
        if (name := self.active_adapter) is None:
            return None
        A, B = stacked(self.lora_A[name], self.lora_B[name], self.stack)
        return LowRankTerm(A, B, self.adapters[name].scaling)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.stack * r, self.in_features), (self.out_features, r * self.stack)

    def active(self) -> LoRAAdapter | None:
        """What the experts' forward adds; None where it is merged, or no adapter is active."""
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("LoRAExperts is merged, so its adapter gets no gradient: call unmerge() to train, or eval()")
        if self.merged or (term := self.active_term) is None:
            return None
        p = self.adapters[self.active_adapter].lora_dropout if self.training else 0.0  # type: ignore[index]
        return LoRAAdapter(term.A, term.B, term.scaling, p)  # type: ignore[arg-type]

    def _initialize(self, adapter: Adapter, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor | None = None) -> None:
        super()._initialize(adapter, lora_A, lora_B, lora_E)
        if adapter.init_lora_weights == "gaussian":  # of deviation 1 / r, and not 1 / (E·r)
            lora_A.data.mul_(self.stack)

    def give_back(self, experts: nn.Module, name: str) -> None:
        """Make the weight, merged or not, what it was: a parameter, dequantised if it is in 4 bits, or bitsandbytes' codes."""
        W = self.matrix
        if not isinstance(W, NF4Weight):
            experts.register_parameter(name, self.weight)
        elif self.is_bitsandbytes:
            put_quantized(experts, name, W, self.storage)
        else:
            experts.register_parameter(name, nn.Parameter(W.dequantize(), requires_grad=False))

    # ---- state dict ----

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Under the name that the parameter has without adapters."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in [key for key in destination if key.startswith(f"{prefix}weight")]:
            destination[prefix[:-1] + key.removeprefix(f"{prefix}weight")] = destination.pop(key)

    def check_state(self, state_dict: Any, prefix: str) -> NF4Weight | None:
        """Raises ValueError too for a 4-bit state in blocks of several experts, or of a stack [E, in, out]."""
        w = super().check_state(as_weight(state_dict, prefix[:-1]), prefix)
        if w is not None and (reason := why_not_4_bit(self.fan_in_fan_out, w.shape, w.blocksize)) is not None:
            raise ValueError(f"{prefix[:-1]}: got a 4-bit stack {tuple(w.shape)}, expected a dense one: {reason}")
        return w

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={a.r}, lora_alpha={a.lora_alpha}" for name, a in self.adapters.items())
        shape = f"experts={self.stack}, in_features={self.in_features}, out_features={self.out_features}"
        if self._format is not None:
            shape += f", {self._format.quant_type} of {self._format.dtype} in blocks of {self._format.blocksize}"
        return f"{shape}, active={self.active_adapter}, merged={self.merged}, adapters={{{adapters}}}"


def as_weight(state_dict: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A state dict in which a stack at `path`, and what is beside it in 4 bits, is the parameter `weight` of a module there."""
    found = {}
    for key, value in state_dict.items():
        beside = key.removeprefix(f"{path}.")
        is_part = key == path or (beside != key and beside.partition(".")[0] in BESIDE)
        found[f"{path}.weight{key.removeprefix(path)}" if is_part else key] = value
    return found


class LoRAExperts:
    """The forward of every adapted experts module; it stands before the module's class in the order of methods."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        adapters = {name: stack.active() for name, stack in stacks(self).items()}
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, adapters)

    def _load_from_state_dict(self: Any, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in stacks(self):
            renamed = as_weight(state_dict, f"{prefix}{name}")
            state_dict.clear()
            state_dict.update(renamed)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class of the module, as this one has no name to be found by."""
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_new, (type(self).__bases__[1], *reduced[1][1:]), *reduced[2:])


class Planned(NamedTuple):
    """A stack that add_lora is to give its first adapter."""

    experts: nn.Module
    name: str

    @property
    def weight(self) -> nn.Parameter | NF4Weight:
        quantized = quantized_stack(self.experts, self.name)
        return getattr(self.experts, self.name) if quantized is None else quantized

    @property
    def is_bitsandbytes(self) -> bool:
        """Whether bitsandbytes has quantised it."""
        return isinstance(self.weight, NF4Weight)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether it is [E, in, out]."""
        return bool(self.experts.is_transposed)

    @property
    def features(self) -> tuple[int, int]:
        """(in, out)."""
        return sizes(self.experts, self.weight)[:0:-1]  # type: ignore[return-value]

    def parameters(self) -> list[nn.Parameter]:
        return [] if self.is_bitsandbytes else [self.weight]  # type: ignore[list-item]

    def why_not_quantized(self) -> str | None:
        """Why `make(quantize="nf4")` cannot put a dense stack into 4 bits."""
        return why_not_4_bit(self.fan_in_fan_out, self.weight.shape)

    def make(self, quantize: str | None = None) -> LoRAStack:
        """quantize="nf4": over an NF4 copy of a dense stack."""
        W = self.weight
        if isinstance(W, NF4Weight):
            return LoRAStack(W, False, self.experts.parametrizations[self.name].original.dtype)  # type: ignore[union-attr, index]
        return LoRAStack(W if quantize is None else quantize_nf4(W.detach()), self.fan_in_fan_out)

    def put(self, stack: LoRAStack) -> None:
        """Give the module the stack, and, with its first one, the forward."""
        with without_parametrizations(self.experts):
            if not isinstance(self.experts, LoRAExperts):
                change_class(self.experts, _class_of(type(self.experts)))  # type: ignore[arg-type]
            del self.experts._parameters[self.name]
            self.experts.add_module(self.name, stack.train(self.experts.training))


def stacks(experts: nn.Module) -> dict[str, LoRAStack]:
    """The stacks that have adapters, by name."""
    found = {name: experts._modules.get(name) for name in weight_names(experts)}
    return {name: stack for name, stack in found.items() if isinstance(stack, LoRAStack)}


def to_experts(experts: nn.Module) -> None:
    """The plain module again, with the merged weights or else the original ones."""
    own = stacks(experts)
    with without_parametrizations(experts):
        for name in own:
            del experts._modules[name]
        change_class(experts, type(experts).__bases__[1])
    for name, stack in own.items():
        stack.give_back(experts, name)


def peft_places(layers: Mapping[str, object]) -> dict[str, str]:
    """Where PEFT has the A and B of each adapted path of one adapter: of experts in wrappers, that of down_proj outermost, but
    innermost over stacks that bitsandbytes has quantised, which PEFT takes in the order of their names.
    """
    stacks = {path: layer for path, layer in layers.items() if isinstance(layer, (LoRAStack, Planned))}
    owners = {path: path.rpartition(".")[0] for path in stacks}
    by_name = {owners[path] for path, stack in stacks.items() if stack.is_bitsandbytes}
    both = {owner for owner in owners.values() if list(owners.values()).count(owner) == 2}
    inner = {path for path, owner in owners.items() if owner in both and path.endswith(".down_proj") == (owner in by_name)}
    return {path: owners.get(path, path) + ".base_layer" * (path in inner) for path in layers}


@functools.cache
def _class_of(kind: type) -> type:
    """`kind` with LoRAExperts' forward, under its name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (LoRAExperts, kind), names)


def _new(kind: type, *args: Any) -> Any:
    return _class_of(kind).__new__(_class_of(kind), *args)
