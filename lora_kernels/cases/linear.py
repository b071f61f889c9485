"""A case of lora_linear: everything that a call depends on, its tensors, what it must give, its arithmetic and its bytes.

x[M,K]  W[N,K]  A[R,K]  B[N,R]  c[N]  m[N]  dy[M,N]      p dropout      s scaling
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..functional.linear import lora_linear
from ..functional.nf4 import quantize
from ..reference import linear as reference
from ..reference.nf4 import dequantize
from ..values import Dropout, LoRAWeights
from .rule import Results, violations

# a tensor's letter and its name in a call
LETTERS = {"x": "x", "W": "weight", "A": "lora_A", "B": "lora_B", "c": "bias", "m": "magnitude"}


@dataclass
class Case:
    """One call of lora_linear. dtype is of x, W and c, adapter_dtype of A and B (None: the same).

    needs: the letters of the tensors that get a gradient. quant_type: "nf4" or "fp4" for a 4-bit W, quantised from base_dtype.
    strided: rows of x and dy lie apart, and begin inside their memory. dora: with a magnitude, in the adapters' dtype.
    """

    M: int | tuple[int, ...] = 17
    K: int = 24
    N: int = 33
    R: int = 4
    p: float = 0.0
    scaling: float | Tensor = 2.0
    bias: bool = True
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    needs: tuple[str, ...] = ("x", "A", "B", "c", "m")
    seed: int = 20260
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    strided: bool = False
    autocast: torch.dtype | None = None
    quant_type: str | None = None
    blocksize: int = 64
    double_quant: bool = True
    base_dtype: torch.dtype = torch.bfloat16
    dora: bool = False

    def __str__(self) -> str:
        return f"{self.K}→{self.N} M={self.rows} r={self.R} p={self.p} {dtype_name(self.dtype)}"

    @property
    def shape(self) -> tuple[int, ...]:
        """x's leading sizes."""
        return (self.M,) if isinstance(self.M, int) else self.M

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype in which x, W and c are read, and y is written."""
        return self.autocast or self.dtype

    def flops(self, backward: bool = True, adapted: bool = True) -> int:
        """Multiply-adds count two. x·Wᵀ and dy·W; with an adapter also h, h·Bᵀ, g, g·A, dA, dB."""
        base, low_rank = (4, 12) if backward else (2, 4)
        total = base * self.rows * self.K * self.N
        return total + low_rank // 2 * self.rows * self.R * (self.K + self.N) if adapted else total

    def bytes(self, backward: bool = True) -> int:
        """What a frozen layer must move: x, W and y once, and for both passes dy, W and dx once."""
        elements = self.rows * (self.K + self.N) + self.K * self.N
        return (2 if backward else 1) * elements * self.dtype.itemsize

    def draw(self, generator: torch.Generator | None = None) -> "Problem":
        """Normal values, scaled so that results have a size near one; unlike at initialisation B is not zero."""
        adapter = self.adapter_dtype or self.dtype

        def normal(*shape: int, scale: float = 1.0, apart: bool = False) -> Tensor:
            padded = (*shape[:-1], shape[-1] + 5) if apart else shape
            t = torch.randn(padded, generator=generator, device=generator.device if generator else "cpu").mul_(scale)
            return t[..., 3:-2] if apart else t

        x, dy = normal(*self.shape, self.K, apart=self.strided), normal(*self.shape, self.N, apart=self.strided)
        W, A = normal(self.N, self.K, scale=self.K**-0.5), normal(self.R, self.K, scale=self.K**-0.5)
        B, c = normal(self.N, self.R, scale=self.R**-0.5), normal(self.N) if self.bias else None
        weight: Any = W.to(self.dtype)
        if self.quant_type is not None:
            weight = quantize(W.to(self.base_dtype), self.quant_type, self.blocksize, self.double_quant)
        own = {"x": x.to(self.dtype), "W": weight, "A": A.to(adapter), "B": B.to(adapter), "dy": dy.to(self.read_dtype)}
        own["c"] = None if c is None else c.to(self.dtype)
        own["m"] = normal(self.N).to(adapter) if self.dora else None
        tensors: dict[str, Any] = {name: None if t is None else t.to(self.device) for name, t in own.items()}
        problem = Problem(self, **tensors)
        for name in self.needs:
            if isinstance(t := getattr(problem, name), Tensor):
                t.requires_grad_()
        return problem


@dataclass(frozen=True)
class Problem:
    """A case with its tensors."""

    case: Case
    x: Tensor
    W: Any  # a Tensor, or an NF4Weight
    A: Tensor
    B: Tensor
    c: Tensor | None
    dy: Tensor
    m: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.case.K

    @property
    def out_features(self) -> int:
        return self.case.N

    @property
    def p(self) -> float:
        return self.case.p

    @property
    def r(self) -> int:
        return self.case.R

    @property
    def lora_alpha(self) -> float:
        return float(self.case.scaling) * self.r

    @property
    def inputs(self) -> dict[str, Any]:
        """What the call takes, by letter; m only where there is one."""
        return {name: getattr(self, name) for name in LETTERS if name != "m" or self.case.dora}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by letter."""
        return {name: t for name, t in self.inputs.items() if isinstance(t, Tensor) and t.requires_grad}

    def member(self) -> LoRAWeights:
        return LoRAWeights(self.W, self.A, self.B, self.c, self.case.scaling, self.m)

    def dropout(self) -> Dropout | None:
        return Dropout(self.p, torch.tensor(self.case.seed, device=self.x.device)) if self.p > 0 else None

    def with_adapters(self, dtype: torch.dtype) -> "Problem":
        """The same problem with its adapters in `dtype`."""
        own = {name: t for name in "ABm" if isinstance(t := getattr(self, name), Tensor)}
        own = {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in own.items()}
        return replace(self, case=replace(self.case, adapter_dtype=dtype), **own)  # type: ignore[arg-type]

    def without_magnitude(self) -> "Problem":
        """The same problem of plain LoRA."""
        return replace(self, case=replace(self.case, dora=False), m=None)

    def quantized(self) -> "Problem":
        """The same problem with its weight in 4 bits, NF4 with nested absmax."""
        case = replace(self.case, quant_type="nf4", base_dtype=self.case.dtype)
        return replace(self, case=case, W=quantize(self.W, "nf4", case.blocksize, case.double_quant))  # type: ignore[arg-type]

    def dequantized(self) -> "Problem":
        """The same problem with the dense weight that its products read."""
        dense = self.W if isinstance(self.W, Tensor) else dequantize(self.W, self.case.read_dtype).to(self.case.dtype)
        return replace(self, case=replace(self.case, quant_type=None), W=dense)

    def compute(self, layer: Callable[..., Tensor]) -> Results:
        """y and the wanted gradients, "dx", "dA" …, of layer(x, W, A, B, c, m)."""
        leaves, autocast = self.leaves, self.case.autocast
        with torch.autocast(self.x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            y = layer(*self.inputs.values())
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype)) if leaves else ()
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def ours(problem: Problem) -> Results:
    """lora_linear's results, by the backend that is set."""
    case = problem.case
    options: dict[str, Any] = {"scaling": case.scaling, "dropout_p": case.p, "seed": case.seed}
    return problem.compute(lambda x, W, A, B, c, m=None: lora_linear(x, W, A, B, c, magnitude=m, **options))


def plain(problem: Problem) -> Results:
    """The reference's results at the case's own dtypes: PyTorch's operations in PEFT's order."""
    scaling, dropout = problem.case.scaling, problem.dropout()

    def layer(x: Tensor, W: Any, A: Tensor, B: Tensor, c: Tensor | None, m: Tensor | None = None) -> Tensor:
        ((y,), _) = reference.forward(x.reshape(-1, x.shape[-1]), (LoRAWeights(W, A, B, c, scaling, m),), dropout)
        return y.view(*x.shape[:-1], y.shape[1])

    return problem.compute(layer)


def truth(problem: Problem) -> Results:
    """The reference's results in float64, over the weight that the products read."""
    exact = problem.dequantized()
    case = replace(exact.case, dtype=torch.float64, adapter_dtype=None, autocast=None, scaling=float(exact.case.scaling))
    tensors = {**exact.inputs, "dy": exact.dy}
    wide: dict[str, Any] = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()
    }
    return plain(Problem(case, **wide))


def wrong(problem: Problem, exact: Results | None = None) -> list[str]:
    """What of lora_linear's results for this problem breaks the rule, a line each. exact: `truth(problem)`, if at hand."""
    return violations(ours(problem), plain(problem), truth(problem) if exact is None else exact, problem.case.read_dtype)
