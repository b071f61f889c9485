"""accelerate's hooks that bring a module's tensors to a device before its forward and may put them back after it.

`device_map`, dispatch_model, cpu_offload and disk_offload leave such a hook on a module, in `_hf_hook`, and replace its forward
on the instance by a wrapper that calls the hook. While the module waits, an offloaded tensor is on the meta device, and the
hook's `weights_map` has its value. accelerate is never imported here: who has such a hook has imported it.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether an instance attribute hides the class's forward, as accelerate's hooks and X-LoRA do.

    accelerate leaves the class's own forward there, bound, when it removes a hook.
    """
    forward = module.__dict__.get("forward")  # vars() is not traced by torch 2.8
    return forward is not None and not _calls_the_class_s(forward, module)


def hooks_call_the_class_s(module: nn.Module) -> bool:
    """Whether what accelerate's hooks on the module call, looked up at each call, is the class's forward."""
    return _calls_the_class_s(module.__dict__.get("_old_forward"), module)


def _calls_the_class_s(forward: Any, module: nn.Module) -> bool:
    """Whether it is the class's forward, bound, or one of ours in front of it: a member of models/blocks/groups.py."""
    return getattr(forward, "__func__", None) is type(module).forward or getattr(forward, "calls_the_class_s", False)


def device_hook(module: nn.Module) -> Any | None:
    """The module's hook if its forward was replaced by nothing but accelerate's call of hooks that move tensors."""
    own = module.__dict__
    hook, wrapper = own.get("_hf_hook"), getattr(own.get("forward"), "func", None)
    is_accelerate_s = getattr(wrapper, "__module__", None) == "accelerate.hooks"
    return hook if is_accelerate_s and hooks_call_the_class_s(module) and _moves_only(hook) else None


def _moves_only(hook: Any) -> bool:
    kind = type(hook)
    if kind.__module__ != "accelerate.hooks" or hook.no_grad:
        return False
    return kind.__name__ == "AlignDevicesHook" or (kind.__name__ == "SequentialHook" and all(map(_moves_only, hook.hooks)))


def _hooks(module: nn.Module) -> list[Any]:
    """The AlignDevicesHooks of a module, in the order in which they run."""
    hook = device_hook(module)
    return [] if hook is None else _flat(hook)


def _flat(hook: Any) -> list[Any]:
    return [inner for each in hook.hooks for inner in _flat(each)] if hasattr(hook, "hooks") else [hook]


def offloading_hooks(module: nn.Module) -> list[Any]:
    """Those of the module's hooks that take its tensors away after each forward."""
    return [hook for hook in _hooks(module) if hook.offload]


def execution_device(module: nn.Module) -> torch.device | int | str | None:
    """Where the module's hooks let it compute; None where they do not say, or there are none."""
    return next((hook.execution_device for hook in reversed(_hooks(module)) if hook.execution_device is not None), None)


def give_hook(source: nn.Module, target: nn.Module) -> None:
    """Let `target` have the hook that `source` has, or none; it acts on target's own tensors of the same names."""
    for name in ("_hf_hook", "_old_forward", "forward"):
        target.__dict__.pop(name, None)
    if (hook := device_hook(source)) is not None:
        own = target.forward
        target._hf_hook, target._old_forward = hook, own  # type: ignore[assignment]
        target.forward = functools.update_wrapper(functools.partial(source.__dict__["forward"].func, target), own)


def change_class(module: nn.Module, new: Any) -> None:
    """Give `module` the class `new`, also where accelerate's hooks keep a bound forward of the old one."""
    old = type(module)
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is old.forward:
            setattr(module, name, types.MethodType(new.forward, module))
    module.__class__ = new


# ---- calls ----


def call_onloaded(modules: Sequence[nn.Module], function: Callable[[Tensor], Result], x: Tensor) -> Result:
    """function(x) with x and the tensors of `modules` where their hooks put them; the result goes back through the hooks.

    A tensor that autograd saves outlives the offloading, which makes a new parameter: as in the modules' own forward.
    """
    entered: list[nn.Module] = []
    result: Any = None
    try:
        for module in modules:
            entered.append(module)
            (x,), _ = module._hf_hook.pre_forward(module, x)  # type: ignore[operator, union-attr]
        result = function(x)
    finally:
        for module in reversed(entered):
            result = module._hf_hook.post_forward(module, result)  # type: ignore[operator, union-attr]
    return result


@contextlib.contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """The module's own tensors have values in this block, wherever a hook keeps them otherwise."""
    hook = device_hook(module) if offloading_hooks(module) else None
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


# ---- values that are kept elsewhere ----


class Offloaded(NamedTuple):
    """A tensor on the meta device whose value a hook keeps, on a CPU or a disk."""

    tensor: Tensor
    values: Mapping[str, Tensor]
    name: str

    def load(self) -> Tensor:
        return self.values[self.name]


def offloaded_tensors(model: nn.Module) -> dict[str, Offloaded]:
    """The parameters and buffers of `model`, by name, that hooks keep; tied ones are there under each name."""
    found: dict[str, Offloaded] = {}
    for path, module in model.named_modules():
        for hook in offloading_hooks(module):
            kept = (module.named_parameters, module.named_buffers) if hook.offload_buffers else (module.named_parameters,)
            for named in kept:
                for name, tensor in named(recurse=hook.place_submodules, remove_duplicate=False):
                    if tensor.is_meta:  # to ask weights_map would read the value from a disk
                        found[f"{path}.{name}".removeprefix(".")] = Offloaded(tensor, hook.weights_map, name)
    return found


def with_values(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Gives a tensor of `model`, or in the place of one that a hook keeps its value, which may be read from a disk."""
    kept = {id(each.tensor): each for each in offloaded_tensors(model).values()}
    return lambda tensor: kept[id(tensor)].load() if id(tensor) in kept else tensor


def loaded_with_another(model: nn.Module) -> set[nn.Module]:
    """Modules whose tensors the hook of a module around them keeps, as with accelerate's preload_module_classes."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if any(hook.place_submodules for hook in offloading_hooks(module)):
            found |= set(module.modules()) - {module}
    return found


def keep_present_values(module: nn.Module) -> list[Mapping[str, Tensor]]:
    """Offload what `module` has now: its hooks load that from now on. What they loaded before is for restore_values."""
    hooks = offloading_hooks(module)
    before = [hook.weights_map for hook in hooks]
    if hooks:
        own = dict(module.named_parameters(recurse=False))
        values = {name: before[-1][name] if tensor.is_meta else tensor.detach().cpu() for name, tensor in own.items()}
        for hook in hooks:
            hook.weights_map = values
        _fit_devices(module, hooks)
        for name, parameter in own.items():
            if not parameter.is_meta:
                setattr(module, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))
    return before


def restore_values(module: nn.Module, before: list[Mapping[str, Tensor]]) -> None:
    """Let the module's hooks load again what they loaded before keep_present_values.

    Where hooks were removed or put on meanwhile, the module itself gets the values of before, and its hooks load those.
    """
    hooks = offloading_hooks(module)
    if len(hooks) == len(before):
        for hook, values in zip(hooks, before, strict=True):
            hook.weights_map = values
        _fit_devices(module, hooks)
        return
    for name, parameter in list(module.named_parameters(recurse=False)) if before else ():
        if parameter.is_meta:
            setattr(module, name, nn.Parameter(before[-1][name], requires_grad=parameter.requires_grad))
    keep_present_values(module)


def _fit_devices(module: nn.Module, hooks: list[Any]) -> None:
    """Let hooks put, when they are removed, the tensors that `module` has now where they found its weight, and no others."""
    for hook in hooks:
        found = hook.original_devices
        named = (module.named_parameters, module.named_buffers)
        names = [name for each in named for name, _ in each(recurse=hook.place_submodules)]
        hook.original_devices = {name: found.get(name, found["weight"]) for name in names}
