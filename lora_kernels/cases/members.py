"""A case of an operation over several members, such as a group of linear layers or an MLP: what cases/linear.py is for one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..functional.nf4 import quantize
from ..reference.nf4 import dequantize
from ..values import Dropout, LoRAWeights
from .rule import Results, violations, violations_on_average

FIELDS = ("weight", "lora_A", "lora_B", "bias", "magnitude")
DRAWS = 32  # of a case that breaks the rule in one


@dataclass(frozen=True)
class Layer:
    """One member: N out-features, rank R, None for a plain one; quant_type: "nf4" or "fp4" in 4 bits; dora: a magnitude."""

    N: int
    R: int | None = 4
    bias: bool = True
    scaling: float | Tensor = 2.0
    quant_type: str | None = None
    dora: bool = False


@dataclass
class MembersCase:
    """One call. dtype is of x, weights and biases, adapter_dtype of the adapters (None: the same).

    needs: "x", and the fields whose tensors get a gradient in every member, but for those that `frozen` names.
    strided: rows of x and of the results' gradients lie apart, and begin inside their memory.
    """

    M: int | tuple[int, ...] = 17
    p: float = 0.0
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    needs: tuple[str, ...] = ("x", "lora_A", "lora_B", "bias", "magnitude")
    frozen: tuple[str, ...] = ()
    seed: int = 20260
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strided: bool = False
    autocast: torch.dtype | None = None
    offset: ClassVar[int] = 0  # of the first member's mask

    def __str__(self) -> str:
        layers = " ".join([f"{name} {K}→{layer.N}" for name, (K, layer) in self.layers().items()])
        return f"{layers} M={torch.Size(self.shape).numel()} p={self.p} {dtype_name(self.dtype)}"

    def layers(self) -> dict[str, tuple[int, Layer]]:
        """(in-features, layer) of each member by name, in the order of the operation."""
        raise NotImplementedError

    def widths(self) -> dict[str, int]:
        """The features of each result by name."""
        raise NotImplementedError

    def call(self, x: Tensor, members: dict[str, LoRAWeights]) -> tuple[Tensor, ...]:
        """The results by the public function."""
        raise NotImplementedError

    def equations(self, x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None) -> tuple[Tensor, ...]:
        """The results of x[M, K] by the reference."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """x's leading sizes."""
        return (self.M,) if isinstance(self.M, int) else self.M

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype in which x and weights are read, and results are written."""
        return self.autocast or self.dtype

    def draw(self, generator: torch.Generator | None = None) -> "MembersProblem":
        """Normal values, scaled so that results have a size near one."""
        adapter = self.adapter_dtype or self.dtype

        def normal(*shape: int, scale: float = 1.0, apart: bool = False) -> Tensor:
            padded = (*shape[:-1], shape[-1] + 5) if apart else shape
            t = torch.randn(padded, generator=generator, device=generator.device if generator else "cpu").mul_(scale)
            return t[..., 3:-2] if apart else t

        def member(K: int, layer: Layer) -> LoRAWeights:
            W, c = normal(layer.N, K, scale=K**-0.5).to(self.dtype), normal(layer.N).to(self.dtype) if layer.bias else None
            weight: Any = W.to(self.device)
            if layer.quant_type is not None:
                weight = quantize(W.to(torch.bfloat16), layer.quant_type, 64, True).to(self.device)
            c = None if c is None else c.to(self.device)
            if layer.R is None:
                return LoRAWeights(weight, None, None, c)
            A, B = normal(layer.R, K, scale=K**-0.5), normal(layer.N, layer.R, scale=layer.R**-0.5)
            A, B = A.to(adapter).to(self.device), B.to(adapter).to(self.device)
            m = normal(layer.N).to(adapter).to(self.device) if layer.dora else None
            return LoRAWeights(weight, A, B, c, layer.scaling, m)

        layers = self.layers()
        x = normal(*self.shape, next(iter(layers.values()))[0], apart=self.strided).to(self.dtype).to(self.device)
        members = {name: member(*layer) for name, layer in layers.items()}
        dys = {name: normal(*self.shape, N, apart=self.strided).to(self.read_dtype) for name, N in self.widths().items()}
        problem = MembersProblem(self, x, members, {name: dy.to(self.device) for name, dy in dys.items()})
        for name, t in problem.tensors().items():
            owner, _, kind = name.rpartition(".")
            t.requires_grad_(kind in self.needs and owner not in self.frozen)
        return problem


@dataclass(frozen=True)
class MembersProblem:
    """A case with its tensors; dys are the gradients of its results."""

    case: MembersCase
    x: Tensor
    members: dict[str, LoRAWeights]
    dys: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that can have a gradient, by a name such as "gate.lora_A"."""
        found = {"x": self.x}
        for owner, member in self.members.items():
            own = {f"{owner}.{name}": value for name, value in zip(FIELDS, (*member[:4], member.magnitude), strict=True)}
            found |= {name: value for name, value in own.items() if isinstance(value, Tensor)}
        return found

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        return {name: t for name, t in self.tensors().items() if t.requires_grad}

    def dropout(self) -> Dropout | None:
        case = self.case
        return Dropout(case.p, torch.tensor(case.seed, device=self.x.device), case.offset) if case.p > 0 else None

    def compute(self, function: Callable[[Tensor, dict[str, LoRAWeights]], tuple[Tensor, ...]]) -> Results:
        """The results and the wanted gradients, "d…", of function(x, members); a result without dy is not used."""
        leaves, autocast = self.leaves, self.case.autocast
        with torch.autocast(self.x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            ys = dict(zip(self.case.widths(), function(self.x, self.members), strict=True))
        if not leaves:
            return {name: y.detach() for name, y in ys.items()}
        used = [name for name in self.dys if ys[name].requires_grad]
        dys = [self.dys[name] for name in used]
        grads = torch.autograd.grad([ys[name] for name in used], list(leaves.values()), dys, allow_unused=True)
        found = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
        return {name: y.detach() for name, y in ys.items()} | found


def ours(problem: MembersProblem) -> Results:
    """The public function's results, by the backend that is set."""
    return problem.compute(problem.case.call)


def plain(problem: MembersProblem) -> Results:
    """The reference's results at the case's own dtypes: PyTorch's operations in PEFT's order."""

    def equations(x: Tensor, members: dict[str, LoRAWeights]) -> tuple[Tensor, ...]:
        ys = problem.case.equations(x.reshape(-1, x.shape[-1]), tuple(members.values()), problem.dropout())
        return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    return problem.compute(equations)


def truth(problem: MembersProblem) -> Results:
    """The reference's results in float64, over the weights that the products read."""
    case = replace(problem.case, dtype=torch.float64, adapter_dtype=None, autocast=None)

    def wide(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().double().requires_grad_(value.requires_grad)
        return value if value is None else dequantize(value, problem.case.read_dtype).double()

    members = {
        name: LoRAWeights._make([*map(wide, member[:4]), float(member.scaling), wide(member.magnitude)])
        for name, member in problem.members.items()
    }
    return plain(MembersProblem(case, wide(problem.x), members, {name: dy.double() for name, dy in problem.dys.items()}))


def wrong(problem: MembersProblem, exact: Results | None = None) -> list[str]:
    """What of the public function's results breaks the rule, for this problem and on average over draws of its case."""
    case, generator = problem.case, torch.Generator(problem.case.device)
    draws = [(ours(problem), plain(problem), truth(problem) if exact is None else exact)]
    if violations(*draws[0], case.read_dtype):
        for seed in range(1, DRAWS):
            another = case.draw(generator.manual_seed(seed))
            draws.append((ours(another), plain(another), truth(another)))
        return violations_on_average(draws, case.read_dtype)
    return []
