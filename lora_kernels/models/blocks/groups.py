"""Siblings over one x, such as q, k and v: the first that is called computes all of them, and hands the others theirs.

Each member has a `Member` as its instance's forward, the parent a hook before its forward and one after it, which also runs
after an exception. Between the two lies a `Scope`, of one thread, with all that is kept: the results that wait for their
member. Outside of it, and in a graph of torch.compile, which would have to trace this state, a member computes alone.
"""

import threading
import types
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...dtypes import autocast_dtype
from ...functional.linear import lora_linear_group
from ...layers.projection import Projection, projection, why_not_together
from ...plan import PLAIN

FUSED = "fused"
OUTSIDE = "it was called outside its parent's forward"
REPLACED = "a member was replaced: call fuse_blocks again"
ANOTHER = "no sibling is expected to take the same x"
TAKEN = "its result was not computed with its sibling's"
ARGUMENTS = "extra arguments"
UNFIT = "arguments that do not fit one operation"


class Scope:
    """One call of a parent's forward: who leads, over which x, and the results that no member has taken yet."""

    def __init__(self, parent: nn.Module, inputs: Iterable[Any]):
        self.parent, self.inputs = parent, [value for value in inputs if isinstance(value, Tensor)]
        self.called: set[str] = set()
        self.forget()

    def forget(self) -> None:
        self.leader: str | None = None
        self.x: Tensor | None = None
        self.state: tuple | None = None
        self.learns = False
        self.reason = TAKEN  # why a sibling finds no result
        self.results: dict[str, Tensor] = {}
        self.sharers: set[str] = set()  # who was called with x after the leader


class PerThread(threading.local):
    """The scope that a thread has open; a copy, or one from a file, has none."""

    scope: Scope | None = None

    def __reduce__(self) -> tuple:
        return PerThread, ()


class Group:
    """Members of one parent by name, in the order of their masks' offsets."""

    def __init__(self, names: tuple[str, ...], calls: Counter):
        self.names, self.calls, self.thread = names, calls, PerThread()
        self.handles: tuple[RemovableHandle, ...] = ()
        self.sharers: dict[str, frozenset[str]] = {}  # by leader: who shared its x in the last call that could be learned from

    # ---- the parent's hooks ----

    def open(self, parent: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.thread.scope = Scope(parent, (*args, *kwargs.values()))

    def close(self, parent: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling() and (scope := self.thread.scope) is not None:
            self.thread.scope = None
            self._finish(scope)

    def _finish(self, scope: Scope) -> None:
        if scope.leader is not None and scope.learns:
            self.sharers[scope.leader] = frozenset(scope.sharers)
        scope.forget()

    # ---- a member's call ----

    def result(self, scope: Scope, name: str, x: Tensor) -> Tensor | str:
        """The member's y, handed over or computed with its siblings'; or the reason why it has to compute alone."""
        if type(x) not in PLAIN or x.is_inference():
            return f"x is a {type(x).__name__}" if type(x) not in PLAIN else "an inference tensor's changes are not counted"
        state = x._version, torch.is_grad_enabled(), autocast_dtype(x.device)
        if scope.x is not x or scope.state != state:
            self._finish(scope)
            return self._lead(scope, name, x, state)
        scope.sharers.add(name)
        y = scope.results.pop(name, None)
        return scope.reason if y is None else y

    def _lead(self, scope: Scope, name: str, x: Tensor, state: tuple) -> Tensor | str:
        expected = self._expected(scope, name, x)
        scope.called.add(name)
        scope.leader, scope.x, scope.state, scope.learns = name, x, state, _is_never_repeated(scope.parent)
        members = {each: scope.parent._modules[each] for each in self.names if each == name or each in expected}
        if len(members) == 1:
            scope.reason = TAKEN
            return ANOTHER
        ys = self._compute(members, x)
        if isinstance(ys, str):
            scope.reason = ys
            return ys
        self.calls[FUSED] += 1
        scope.results = ys
        return scope.results.pop(name)

    def _expected(self, scope: Scope, leader: str, x: Tensor) -> set[str]:
        """Which siblings are computed ahead: those that took the same x after this leader before. So the k and v that an
        encoder's states, or a cache, give to cross-attention cost nothing, and share one operation themselves.

        A parent of which nothing is known yet is thought to give all of them its one input. Where it got several that could be
        x, none is computed ahead: for in training with checkpoints nothing is learned.
        """
        others = {each for each in self.names if each != leader and each not in scope.called}
        known = self.sharers.get(leader)
        if known is None:
            alike = {id(t) for t in scope.inputs if t.ndim == x.ndim and t.shape[-1] == x.shape[-1] and t.is_floating_point()}
            known = frozenset(others if len(alike) <= 1 else ())
        return {each for each in others if each in known and is_member_of(scope.parent._modules.get(each), self, each)}

    def _compute(self, members: dict[str, Any], x: Tensor) -> dict[str, Tensor] | str:
        found: list[Projection] = []
        for module in members.values():
            own = projection(module, x)
            if isinstance(own, str):
                return own
            found.append(own)
        if (reason := why_not_together(x, found)) is not None:
            return reason
        p = max(member.dropout_p for member in found)
        try:
            ys = lora_linear_group(x, [member.weights for member in found], dropout_p=p)
        except (TypeError, ValueError):
            return UNFIT
        cast = [y.to(x.dtype) if member.returns_x_dtype else y for y, member in zip(ys, found, strict=True)]
        return dict(zip(members, cast, strict=True))


class Member:
    """The forward of a layer in a group. It knows its layer by a weak reference: a strong one would be a circle, and keep a
    model's memory until Python's garbage collector runs; the parent it is told by the parent's hook, as a replica of
    nn.DataParallel has another one.
    """

    calls_the_class_s = True  # see layers/offload.py

    def __init__(self, module: nn.Module, name: str, group: Group):
        self.module, self.name, self.group = weakref.ref(module), name, group

    def __getstate__(self) -> tuple:
        return self.module(), self.name, self.group

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module: Any = self.module()
        if torch.compiler.is_compiling():
            return type(module).forward(module, *args, **kwargs)
        scope = self.group.thread.scope
        y: Tensor | str = OUTSIDE
        if scope is not None:
            own, y = scope.parent._modules.get(self.name), REPLACED
            if own is not None and is_member_of(own, self.group, self.name):
                module = own
                y = ARGUMENTS if len(args) != 1 or kwargs else self.group.result(scope, self.name, args[0])
        if isinstance(y, str):
            self.group.calls[y] += 1
            return type(module).forward(module, *args, **kwargs)
        if hasattr(type(module), "count_fused"):
            module.count_fused()
        return y


def member_of(module: nn.Module) -> Member | None:
    """The Member that is a layer's forward, maybe inside accelerate's hooks."""
    own = module.__dict__
    if type(found := own.get("forward")) is Member or type(found := own.get("_old_forward")) is Member:
        return found
    return None


def is_member_of(module: nn.Module | None, group: Group, name: str) -> bool:
    member = None if module is None else member_of(module)
    return member is not None and member.group is group and member.name == name


def _is_never_repeated(parent: nn.Module) -> bool:
    """Whether no checkpoint can run this call again, which then has to make the same choices as the first time: not in a
    backward pass, not where what autograd saves is packed, and not without gradients in training.
    """
    packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    again = torch._C._current_graph_task_id() != -1
    return not (packed or again or (parent.training and not torch.is_grad_enabled()))


# ---- making and unmaking ----


def join(parent: nn.Module, names: tuple[str, ...], calls: Counter) -> None:
    """Let these children of `parent` be a group."""
    group = Group(names, calls)
    for name in names:
        module = parent._modules[name]
        assert module is not None
        key = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
        module.__dict__[key] = Member(module, name, group)
    # kept, as a handle from a file tells torch that its number is in use
    group.handles = (
        parent.register_forward_pre_hook(group.open, with_kwargs=True),
        parent.register_forward_hook(group.close, always_call=True),
    )


def groups_of(parent: nn.Module) -> list[Group]:
    """The groups whose parent this is."""
    found = [getattr(hook, "__self__", None) for hook in parent._forward_pre_hooks.values()]
    return [each for each in found if isinstance(each, Group)]


def part(module: nn.Module) -> None:
    """Take away what `join` gave to the module, as a member and as a parent."""
    own: Any = module.__dict__
    if isinstance(own.get("forward"), Member):
        del own["forward"]
    if isinstance(own.get("_old_forward"), Member):
        own["_old_forward"] = types.MethodType(type(module).forward, module)
    for group in groups_of(module):
        for handle in group.handles:
            handle.remove()
