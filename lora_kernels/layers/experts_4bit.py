"""Stacks of experts in 4 bits: which can be, and how bitsandbytes' replace_parameter_4bit keeps them.

It parametrises the parameter (torch.nn.utils.parametrize): `parametrizations.<name>.original` holds the codes, and a property
of the module's class, which is made for it, stands in the parameter's place and dequantises all experts. Here codes are read.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, type_before_parametrizations

from ..nf4 import NF4Weight
from ..nf4.storage import as_storage

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MODULE = "bitsandbytes.nn.parametrize"


def quantized_stack(experts: nn.Module, name: str) -> NF4Weight | None:
    """The stack that bitsandbytes has quantised, its bytes shared; None for any other, also one that PEFT adds B·A to."""
    own = _parametrization(experts, name)
    return None if own is None else NF4Weight.from_bnb(own.original, own[0].quant_state)


def why_not_4_bit(is_transposed: bool, shape: torch.Size, blocksize: int = 64) -> str | None:
    """Why a stack of this shape, as it is stored, cannot be computed with in blocks of `blocksize`."""
    if is_transposed:
        return "its experts are [in, out], and in 4 bits only [out, in] can be multiplied by"
    _, N, K = shape
    return f"blocks of {blocksize} run over the ends of its experts of {N}·{K}" if N * K % blocksize else None


def why_not_stacks(experts: Any, names: tuple[str, ...]) -> str | None:
    """Why experts with these stacks, parametrised ones among them, cannot be computed with."""
    if any(_parametrization(experts, name) is None for name in experts._modules.get("parametrizations", {})):
        return "a stack has parametrizations beside bitsandbytes', such as PEFT leaves there after a forward of its own"
    for name in names:
        own = _parametrization(experts, name)
        state = None if own is None else own[0].quant_state
        if state is not None and (reason := why_not_4_bit(experts.is_transposed, state.shape, state.blocksize)) is not None:
            return f"{name} is a 4-bit stack {tuple(state.shape)}: {reason}"
    return None


def has_only_its_hooks(module: nn.Module) -> bool:
    """Whether the hooks of a module are bitsandbytes', which let a dequantised stack be kept during a forward."""
    own = module.__dict__
    return all(getattr(hook, "__module__", None) == MODULE for kind in HOOKS for hook in own[kind].values())


@contextlib.contextmanager
def without_parametrizations(experts: nn.Module) -> Iterator[None]:
    """The module by its own class, its 4-bit stacks' codes as parameters, in this block; those left are as they were then.

    The class with the properties is left as it is, unlike by remove_parametrizations: copies of the module share it.
    """
    found: Any = experts._modules.get("parametrizations", {})
    if found:
        experts.__class__ = type_before_parametrizations(experts)
        del experts._modules["parametrizations"]
        for name, own in found.items():
            experts.register_parameter(name, own.original)
    try:
        yield
    finally:
        for name, own in found.items():
            if name in experts._parameters:
                register_parametrization(experts, name, own[0], unsafe=True)


def put_quantized(experts: nn.Module, name: str, w: NF4Weight, storage: torch.dtype) -> None:
    """Make `w` the stack, as bitsandbytes has it. Its hooks are on the module, from the first time."""
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    experts.register_parameter(name, nn.Parameter(as_storage(w.codes, storage), requires_grad=False))
    register_parametrization(experts, name, Bnb4bitParametrization(w.to_bnb()[1]), unsafe=True)


def _parametrization(experts: nn.Module, name: str) -> Any | None:
    """The list with the codes of a stack that is parametrised by bitsandbytes alone."""
    found: Any = experts._modules.get("parametrizations")
    if found is None or name not in found or len(found[name]) != 1:
        return None
    kind = type(found[name][0])
    is_its = kind.__name__ == "Bnb4bitParametrization" and kind.__module__ == MODULE
    return found[name] if is_its and isinstance(found[name].original, Tensor) else None
