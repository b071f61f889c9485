"""An MLP's forward as one operation: y = down(act(gate(x))·up(x)), or down(act(up(x))).

The module gets a class of the same name that overrides `forward`: so copies, files, nn.DataParallel's replicas and
torch.compile go on as before. Each call looks for a reason against it; where there is one the module's own forward computes,
and the reason is counted.
"""

import copyreg
import functools
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...functional.glu_mlp import lora_glu_mlp
from ...layers.offload import change_class
from ...layers.projection import Projection, projection, why_not_called, why_not_together
from ...nf4 import NF4Weight
from .groups import ARGUMENTS, FUSED, UNFIT

BLOCK = "_lora_kernels_mlp"  # the module's Block


class Wiring(NamedTuple):
    """What an MLP does with its linear layers.

    members: the names of (gate, up, down) or (up, down), or (gate_up, down), of which gate_half (0 or 1) says which half of the
    first one's result is gate's. dropout: the name of the nn.Dropout that its result goes through, if there is one.
    """

    members: tuple[str, ...]
    activation: str
    gate_half: int | None = None
    dropout: str | None = None


class Block:
    """The wiring that was found, all else on which it depends, and how many calls were fused, or why they were not."""

    def __init__(self, module: nn.Module, wiring: Wiring, argument: str, calls: Counter):
        self.wiring, self.argument, self.calls = wiring, argument, calls
        self.others = others(module, wiring.members)

    def compute(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor | str:
        if len(args) + len(kwargs) != 1 or (kwargs and self.argument not in kwargs):
            return ARGUMENTS
        if self.differs_from(module):
            return "it was changed: call fuse_blocks again"
        y = computed(module, self.wiring, args[0] if args else kwargs[self.argument])
        dropout = self.wiring.dropout
        return y if isinstance(y, str) or dropout is None else module._modules[dropout](y)

    def differs_from(self, module: nn.Module) -> bool:
        """The compiler of torch 2.11 cannot list a module's attributes: in a graph those that were found once are looked at."""
        if torch.compiler.is_compiling():
            return any(_differ(getattr(module, name, None), value) for name, value in self.others.items())
        now = others(module, self.wiring.members)
        return now.keys() != self.others.keys() or any(_differ(now[name], value) for name, value in self.others.items())

    def count(self, module: nn.Module, y: Tensor | str) -> None:
        """Not while a compiler traces: it would make the numbers a part of the graph."""
        if torch.compiler.is_compiling():
            return
        self.calls[y if isinstance(y, str) else FUSED] += 1
        if not isinstance(y, str):
            for name in self.wiring.members:
                member: Any = module._modules[name]
                if hasattr(type(member), "count_fused"):
                    member.count_fused()


class FusedMLP:
    """The forward of every fused MLP; it stands before the module's class in the order of methods."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = self.__dict__.get(BLOCK)
        if block is None:  # FSDP2 has made a class of this one, which unfuse_blocks could not take away
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        y = block.compute(self, args, kwargs)
        block.count(self, y)
        return super().forward(*args, **kwargs) if isinstance(y, str) else y  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class of the module, as the fused one has no name to be found by."""
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or type(self).__bases__[0] is not FusedMLP:  # type: ignore[attr-defined]
            return reduced
        return (_new, (_plain_class(type(self)), *reduced[1][1:]), *reduced[2:])


@functools.cache
def fused_class(kind: type) -> type:
    """`kind` with FusedMLP's forward, under its name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (FusedMLP, kind), names)


def _plain_class(kind: type) -> type:
    return kind.__bases__[1]


def _new(kind: type, *args: Any) -> Any:
    return fused_class(kind).__new__(fused_class(kind), *args)


def fuse(module: nn.Module, block: Block) -> None:
    """Let the module's forward be the operation from now on."""
    change_class(module, fused_class(type(module)))  # type: ignore[arg-type]
    module.__dict__[BLOCK] = block


def unfuse(module: nn.Module) -> None:
    """The module's own class again."""
    if module.__dict__.pop(BLOCK, None) is not None and type(module).__bases__[0] is FusedMLP:
        change_class(module, _plain_class(type(module)))


def block_of(module: nn.Module) -> Block | None:
    return module.__dict__.get(BLOCK)


def others(module: nn.Module, members: tuple[str, ...]) -> dict[str, Any]:
    """What else a forward can depend on: the module's other children and its own public attributes."""
    own = module.__dict__
    found = {name: value for name, value in own.items() if name[0] != "_" and name not in ("training", "forward")}
    found.update({name: child for name, child in own["_modules"].items() if name not in members})
    return found


def _differ(now: Any, before: Any) -> bool:
    """Numbers are others in a model from a file, which does not keep which object they are."""
    return now is not before and not (isinstance(now, (int, float, str)) and type(now) is type(before) and now == before)


# ---- one call ----


def computed(module: Any, wiring: Wiring, x: Any) -> Tensor | str:
    """y without the trailing dropout, or the reason why the module's own forward has to compute."""
    if not isinstance(x, Tensor):
        return f"x is a {type(x).__name__}"
    found: list[Projection] = []
    for name in wiring.members:
        member = module._modules.get(name)
        if member is None:
            return "a member was taken away"
        own = why_not_called(member) or projection(member, x)
        if isinstance(own, str):
            return own
        found.append(own)
    if (reason := why_not_together(x, found)) is not None:
        return reason
    p, returns_x_dtype = max([member.dropout_p for member in found]), found[-1].returns_x_dtype
    weights = [member.weights for member in found]
    if wiring.gate_half is not None:
        halves = _halves(found[0])
        if isinstance(halves, str):
            return halves
        weights[:1] = halves if wiring.gate_half == 0 else halves[::-1]
    if any(member.magnitude is not None for member in weights):
        return "DoRA"
    gate = weights[0] if len(weights) == 3 else None
    try:
        y = lora_glu_mlp(x, gate, *weights[-2:], activation=wiring.activation, dropout_p=p)
    except (TypeError, ValueError):
        return UNFIT
    return y.to(x.dtype) if returns_x_dtype else y


def _halves(member: Projection) -> list[Any] | str:
    """The two projections whose results a fused one's result is made of; they share its A, and drop x each for itself."""
    W, A, B, c, scaling, m = member.weights
    if isinstance(W, NF4Weight):
        return "gate and up are halves of one 4-bit weight, whose blocks cannot be shared"
    N = W.shape[0] // 2
    parts = (slice(0, N), slice(N, None))
    return [
        type(member.weights)(
            W[rows], A, None if B is None else B[rows], None if c is None else c[rows], scaling, None if m is None else m[rows]
        )
        for rows in parts
    ]
