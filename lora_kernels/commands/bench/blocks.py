"""The modules that the benchmark times: linear layers of one kind, put together as in a decoder layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...cases import glu_mlp
from ...cases.linear import Problem
from ...cases.linear_group import GroupCase
from ...cases.members import Layer, MembersProblem
from .suites import FORWARD, Workload

TOGETHER = {"qkv": ("q", "k", "v"), "mlp": ("gate", "up", "down")}  # what is one operation each in fused blocks


class Block(nn.Module):
    """The call of `case.shape` over layers by name: inputs -> outputs, tuples of [M, features]."""

    def __init__(self, kind: str, layers: dict[str, nn.Module]):
        super().__init__()
        self.kind, self.layers = kind, nn.ModuleDict(layers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.kind == "linear":
            return (self.layers["linear"](*inputs),)
        if self.kind == "qkv":
            return self.qkv(*inputs)
        if self.kind == "mlp":
            return (self.mlp(*inputs),)
        x, a, z = inputs
        return (*self.qkv(x), self.layers["o"](a), self.mlp(z))

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layers[name](x) for name in TOGETHER["qkv"])

    def mlp(self, x: Tensor) -> Tensor:
        return self.layers["down"](F.silu(self.layers["gate"](x)) * self.layers["up"](x))


@dataclass(frozen=True)
class BlockProblem:
    """One problem per layer; what the call reads and the gradients of what it returns."""

    case: Workload
    layers: dict[str, Problem]
    inputs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]

    @classmethod
    def draw(cls, case: Workload, device: torch.device, seed: int) -> "BlockProblem":
        """Every layer with weights of its own. Layers that share an input share it here too."""
        layers: dict[str, Problem] = {}
        for number, (name, one) in enumerate(case.cases(device, seed).items()):
            problem = one.draw(torch.Generator(device).manual_seed(seed + number))
            shared = {"k": "q", "v": "q", "up": "gate"}.get(name)
            layers[name] = replace(problem, x=layers[shared].x) if shared else problem
        ends = [name for name in layers if name not in ("gate", "up")]
        starts = [name for name in layers if name in ("linear", "q", "o", "gate")]
        return cls(case, layers, tuple(layers[n].x for n in starts), tuple(layers[n].dy for n in ends))

    def map(self, change: Callable[[Problem], Problem]) -> "BlockProblem":
        """`change` applied to every layer."""
        return replace(self, layers={name: change(problem) for name, problem in self.layers.items()})

    def fused(self) -> dict[str, MembersProblem]:
        """The operations on several layers that a fused block calls, "qkv" and "mlp", over the tensors of those layers."""
        case = self.case
        about: dict[str, Any] = {"M": case.M, "p": case.p, "dtype": case.dtype, "device": self.inputs[0].device}
        found: dict[str, MembersProblem] = {}
        for kind, names in TOGETHER.items():
            if not self.layers.keys() >= set(names):
                continue
            layers = [self.layers[name] for name in names]
            first, last = layers[0], layers[-1]
            sizes: dict[str, Any] = {"K": first.in_features}
            if kind == "qkv":
                own: Any = GroupCase(**about, **sizes, members=tuple([Layer(layer.out_features) for layer in layers]))
                dys = {name: layer.dy for name, layer in zip(names, layers, strict=True)}
            else:
                own = glu_mlp.Case(**about, **sizes, I=first.out_features, N=last.out_features)
                dys = {"y": last.dy}
            members = {name: layer.member() for name, layer in zip(names, layers, strict=True)}
            found[kind] = MembersProblem(own, first.x, members, dys)
        return found

    def step(self, module: nn.Module) -> Callable[[], object]:
        """Forward and backward to the inputs and to every trained parameter; or forward alone, in evaluation mode."""
        if self.case.passes == FORWARD:
            module.eval()
            return torch.no_grad()(lambda: module(*self.inputs))
        wanted = [*self.inputs, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
        return lambda: torch.autograd.grad(module(*self.inputs), wanted, self.dys)
