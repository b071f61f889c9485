"""A model inside wrappers that are no part of its names: torch.compile's, parallel ones', activation checkpointing's, FSDP1's.

A whole model may be wrapped, and so may any module in it. `model.compile()` and FSDP2 wrap nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

COMPILED = "_orig_mod"
FSDP1 = "_fsdp_wrapped_module"
HELD = (COMPILED, "_checkpoint_wrapped_module", FSDP1)  # the attribute in which the inner module is
PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)  # theirs is `module`


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside all wrappers around it."""
    while (held := _held(model)) is not None:
        model = getattr(model, held)
    return model


def is_fsdp1(module: nn.Module) -> bool:
    """Whether it is a FullyShardedDataParallel, whose parameters are views into flat ones of its own."""
    return FSDP1 in module._modules


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its path in the plain model, without the wrappers; otherwise as nn.Module.named_modules."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if remove_duplicate and id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(f"{path}.{name}".removeprefix("."), child)

    return walk("", model)


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by its name in the plain model, otherwise as nn.Module.named_parameters."""
    return _named(model, remove_duplicate, "_parameters")


def named_buffers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Every buffer by its name in the plain model, otherwise as nn.Module.named_buffers."""
    return _named(model, remove_duplicate, "_buffers")


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path of the plain model."""
    module = unwrapped(model)
    for name in path.split(".") if path else ():
        module = unwrapped(getattr(module, name))
    return module


def plain_state_dict(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Tensor]:
    """model.state_dict(keep_vars=…) under the plain model's names."""
    model = unwrapped(model)
    plain = plain_names(model)
    return {plain(name): value for name, value in model.state_dict(keep_vars=keep_vars).items()}


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """Gives a name in `model` as the plain model has it."""
    parallel = {
        f"{path}.module".removeprefix(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PARALLEL)
    }

    def plain(name: str) -> str:
        parts = name.split(".")
        ends = enumerate(parts, 1)
        return ".".join(part for end, part in ends if part not in HELD and ".".join(parts[:end]) not in parallel)

    return plain


def put(owner: nn.Module, attribute: str, value: nn.Module | nn.Parameter) -> None:
    """owner.attribute = value, inside the wrappers that are there."""
    while isinstance(present := getattr(owner, attribute), nn.Module) and (held := _held(present)) is not None:
        owner, attribute = present, held
    setattr(owner, attribute, value)
    if attribute == COMPILED:
        owner._initialize()  # type: ignore[operator]  # torch.compile bound the call of the module that was there


def _held(module: nn.Module) -> str | None:
    """The attribute in which a wrapper has the module inside; None for any other module."""
    if isinstance(module, PARALLEL):
        return "module"
    return next((name for name in HELD if name in module._modules), None)


def _named(model: nn.Module, remove_duplicate: bool, members: str) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in named_modules(model, remove_duplicate):
        for name, tensor in getattr(module, members).items():
            if tensor is not None and not (remove_duplicate and id(tensor) in seen):
                seen.add(id(tensor))
                yield f"{path}.{name}".removeprefix("."), tensor
