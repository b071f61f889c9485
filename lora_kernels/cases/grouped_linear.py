"""Cases of lora_grouped_linear, whose member is a stack, and of multi_lora_linear, whose members are a base and adapters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from ..functional.grouped_linear import lora_grouped_linear, multi_lora_linear
from ..functional.nf4 import quantize
from ..reference import grouped_linear as reference
from ..segments import Segments
from ..values import Dropout, LoRAAdapter, LoRAWeights, Rows
from .members import MembersCase, MembersProblem


@dataclass
class SegmentsCase(MembersCase):
    """x[M, K] -> y[M, N] over segments of these sizes; the rows that are left of M are of none.

    host: it knows the sizes. quant_type: "nf4" or "fp4" in 4 bits.
    """

    K: int = 24
    N: int = 33
    sizes: tuple[int, ...] = (5, 0, 9, 2)
    bias: bool = True
    quant_type: str | None = None
    host: bool = True

    def __str__(self) -> str:
        form = f"{type(self).__name__} {self.K}→{self.N} M={self.M} {self.sizes}"
        return f"{form} p={self.p} {dtype_name(self.dtype)}"

    def widths(self) -> dict[str, int]:
        return {"y": self.N}

    def ids(self) -> Tensor:
        """Of the rows of x, sorted."""
        ids = [e for e, size in enumerate(self.sizes) for _ in range(size)]
        return torch.tensor([*ids, *[-1] * (torch.Size(self.shape).numel() - len(ids))], dtype=torch.int64)

    def segments(self) -> Segments:
        found = Segments.from_ids(self.ids(), len(self.sizes)).to(self.device)
        return found if self.host else found._replace(host=None)

    def weights(self, normal: Any) -> dict[str, LoRAWeights]:
        """The members by name; normal(*shape, scale) draws."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator | None = None) -> MembersProblem:
        """Normal values, scaled so that results have a size near one."""

        def normal(*shape: int, scale: float = 1.0, apart: bool = False, dtype: torch.dtype = self.dtype) -> Tensor:
            padded = (*shape[:-1], shape[-1] + 5) if apart else shape
            t = torch.randn(padded, generator=generator, device=generator.device if generator else "cpu").mul_(scale)
            return (t[..., 3:-2] if apart else t).to(dtype).to(self.device)

        x = normal(*self.shape, self.K, apart=self.strided)
        members = self.weights(normal)
        dy = normal(*self.shape, self.N, apart=self.strided, dtype=self.read_dtype)
        problem = MembersProblem(self, x, members, {"y": dy})
        for name, t in problem.tensors().items():
            owner, _, kind = name.rpartition(".")
            t.requires_grad_(kind in self.needs and owner not in self.frozen)
        return problem

    def weight(self, normal: Any, *stack: int) -> Any:
        """W of these leading sizes, [N, K]."""
        W = normal(*stack, self.N, self.K, scale=self.K**-0.5)
        return W if self.quant_type is None else quantize(W.to(torch.bfloat16), self.quant_type, 32, True)

    def dropouts(self) -> tuple[float, ...]:
        """p of each adapter, where they have one of their own."""
        return ()

    def rows(self) -> Rows:
        return Rows(self.segments().offsets, None, None)

    def equations(self, x: Tensor, members: tuple[LoRAWeights, ...], dropout: Dropout | None) -> tuple[Tensor, ...]:
        return reference.forward(x, members, dropout, self.rows(), self.dropouts())[0]


@dataclass
class GroupedCase(SegmentsCase):
    """lora_grouped_linear: x is sorted. own: which of "weight" and "bias" each segment has for itself."""

    R: int = 4
    scaling: float | Tensor = 2.0
    own: tuple[str, ...] = ("weight", "bias")

    def weights(self, normal: Any) -> dict[str, LoRAWeights]:
        E, adapter = len(self.sizes), self.adapter_dtype or self.dtype
        weight = self.weight(normal, *((E,) if "weight" in self.own else ()))
        A = normal(E, self.R, self.K, scale=self.K**-0.5, dtype=adapter)
        B = normal(E, self.N, self.R, scale=self.R**-0.5, dtype=adapter)
        bias = normal(*((E, self.N) if "bias" in self.own else (self.N,))) if self.bias else None
        return {"experts": LoRAWeights(weight, A, B, bias, self.scaling)}

    def call(self, x: Tensor, members: dict[str, LoRAWeights]) -> tuple[Tensor, ...]:
        W, A, B, c, s, _ = members["experts"]
        y = lora_grouped_linear(x, W, A, B, self.segments(), c, scaling=s, dropout_p=self.p, seed=self.seed)  # type: ignore[arg-type]
        return (y,)


@dataclass
class MultiCase(SegmentsCase):
    """multi_lora_linear: adapters of these ranks and scalings, and where p > 0 of p, 0, p/2, p …; rows in no order."""

    ranks: tuple[int, ...] = (4, 3, 7, 1)
    scalings: tuple[float | Tensor, ...] = (2.0, 0.5, -1.0, 1.0)

    def ids(self) -> Tensor:
        ids = super().ids()
        return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(7))]

    def rows(self) -> Rows:
        found = self.segments()
        return Rows(found.offsets, found.order, None)

    def dropouts(self) -> tuple[float, ...]:
        return tuple([(self.p, 0.0, self.p / 2)[i % 3] for i in range(len(self.ranks))])

    @property
    def names(self) -> list[str]:
        return [f"adapter{i}" for i in range(len(self.ranks))]

    def weights(self, normal: Any) -> dict[str, LoRAWeights]:
        adapter, found = self.adapter_dtype or self.dtype, {}
        base = LoRAWeights(self.weight(normal), None, None, normal(self.N) if self.bias else None)
        for name, R, s in zip(self.names, self.ranks, self.scalings, strict=True):
            A, B = normal(R, self.K, scale=self.K**-0.5, dtype=adapter), normal(self.N, R, scale=R**-0.5, dtype=adapter)
            found[name] = LoRAWeights(None, A, B, None, s)  # type: ignore[arg-type]
        return {"base": base, **found}

    def call(self, x: Tensor, members: dict[str, LoRAWeights]) -> tuple[Tensor, ...]:
        base, *own = members.values()
        pairs = zip(own, self.dropouts(), strict=True)
        adapters = [LoRAAdapter(m.lora_A, m.lora_B, m.scaling, p) for m, p in pairs]  # type: ignore[arg-type]
        return (multi_lora_linear(x, base.weight, adapters, self.segments(), base.bias, seed=self.seed),)
