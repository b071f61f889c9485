"""Random groups and MLPs under the one rule: what the backend that is set makes of them, beside float64 and plain PyTorch."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from accuracy import nan_in_fresh_memory
from torch import Tensor
from triton_interpreter import DEVICE

from lora_kernels import LoRAWeights, NF4Weight, lora_glu_mlp, lora_linear_group, quantize_nf4
from lora_kernels.cases.rule import Results, violations
from lora_kernels.reference import glu_mlp, linear
from lora_kernels.reference.nf4 import dequantize
from lora_kernels.values import Dropout

FP32 = torch.float32
FIELDS = ("lora_A", "lora_B", "bias")


@dataclass
class Block:
    """A group of `outputs` over x[M, K], or with an activation an MLP of gate, up (K→outputs[0]) and down (→outputs[-1]).

    ranks: one for each member, None for a plain one. wanted: of "x" and "0.lora_A" …, None for all. used: the results that
    have a gradient, None for all. apart: rows of x and dy lie apart.
    """

    M: int = 19
    K: int = 40
    outputs: tuple[int, ...] = (24, 33, 50)
    ranks: tuple[int | None, ...] = (4, 12, 8)
    p: float = 0.3
    activation: str | None = None
    dtype: torch.dtype = FP32
    adapter_dtype: torch.dtype | None = None
    four_bits: tuple[int, ...] = ()  # members
    wanted: tuple[str, ...] | None = None
    used: tuple[int, ...] | None = None
    apart: bool = False
    scalings: tuple[Any, ...] = field(default=(2.0, 0.5, 1.5, 0.7))
    seed: int = 20260

    def draw(self) -> "Drawn":
        adapter = self.adapter_dtype or self.dtype
        widths = [self.K] * len(self.outputs)
        if self.activation:
            widths[-1] = self.outputs[-2]

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype, apart: bool = False) -> Tensor:
            t = torch.randn(*shape[:-1], shape[-1] + 5 * apart).mul_(scale).to(dtype).to(DEVICE)
            return t[..., 3:-2] if apart else t

        members = []
        for i, (K, N, R, s) in enumerate(zip(widths, self.outputs, self.ranks, self.scalings, strict=False)):
            W: Any = normal(N, K, scale=K**-0.5)
            W = quantize_nf4(W) if i in self.four_bits else W
            A, B = (None, None) if R is None else (normal(R, K, scale=K**-0.5, dtype=adapter), normal(N, R, dtype=adapter))
            members.append(LoRAWeights(W, A, B, normal(N), s))
        results = self.outputs[-1:] if self.activation else self.outputs
        dys = [normal(self.M, N, apart=self.apart) for N in results]
        return Drawn(self, normal(self.M, self.K, apart=self.apart), tuple(members), dys)


@dataclass
class Drawn:
    """A block with its tensors."""

    block: Block
    x: Tensor
    members: tuple[LoRAWeights, ...]
    dys: list[Tensor]

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that may get a gradient, by name."""
        found = {f"{i}.{name}": getattr(m, name) for i, m in enumerate(self.members) for name in ("weight", *FIELDS)}
        found = {"x": self.x, **{name: t for name, t in found.items() if isinstance(t, Tensor)}}
        wanted = self.block.wanted or [name for name in found if not name.endswith("weight")]
        return {name: found[name] for name in wanted}

    def computed(self, compute: Any, wide: torch.dtype | None = None) -> Results:
        """Results and wanted gradients of compute(x, members), in float64 if `wide`."""
        names, own = list(self.leaves()), {}

        def read(name: str, t: Any) -> Any:
            if isinstance(t, NF4Weight):
                return t if wide is None else dequantize(t, self.block.dtype).to(wide)
            if not isinstance(t, Tensor):
                return t
            own[name] = t.detach().to(wide or t.dtype).requires_grad_(name in names)
            return own[name]

        members = tuple(
            LoRAWeights(*[read(f"{i}.{name}", value) for name, value in zip(member._fields, member, strict=True)])
            for i, member in enumerate(self.members)
        )
        ys = compute(read("x", self.x), members)
        used = range(len(ys)) if self.block.used is None else self.block.used
        dys = [self.dys[i].to(ys[i].dtype) for i in used]
        grads = torch.autograd.grad([ys[i] for i in used], [own[n] for n in names], dys, allow_unused=True)
        results = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return results | {f"d{n}": grad for n, grad in zip(names, grads, strict=True) if grad is not None}

    def ours(self) -> Results:
        b = self.block

        def compute(x: Tensor, members: Any) -> tuple[Tensor, ...]:
            if b.activation is None:
                return lora_linear_group(x, members, dropout_p=b.p, seed=b.seed)
            gate, up, down = members if len(members) == 3 else (None, *members)
            return (lora_glu_mlp(x, gate, up, down, activation=b.activation, dropout_p=b.p, seed=b.seed),)

        with nan_in_fresh_memory():
            return self.computed(compute)

    def reference(self, wide: torch.dtype | None = None) -> Results:
        b = self.block

        def compute(x: Tensor, members: Any) -> tuple[Tensor, ...]:
            dropout = (
                Dropout(b.p, torch.tensor(b.seed, device=DEVICE), 3 - len(members) if b.activation else 0) if b.p else None
            )
            if b.activation is None:
                return linear.forward(x, members, dropout)[0]
            return glu_mlp.forward(x, members, dropout, b.activation)[0]

        return self.computed(compute, wide)


def broken(*blocks: Block, draws: int = 1) -> dict[str, list[str]]:
    """The results that break the rule over all draws of the blocks, and how; inputs that are written to are errors."""
    found: dict[str, list[str]] = {}
    for block in blocks:
        torch.manual_seed(0)
        parts: list[tuple[Results, ...]] = []
        for drawn in [block.draw() for _ in range(draws)]:
            tensors = [drawn.x, *drawn.dys, *[t for m in drawn.members for t in m if isinstance(t, Tensor)]]
            before = [t.detach().clone() for t in tensors]
            parts.append((drawn.ours(), drawn.reference(), drawn.reference(torch.float64)))
            assert all(map(torch.equal, tensors, before)), "an input was written to"
        assert all(set(ours) == set(plain) for ours, plain, _ in parts), "other gradients than PyTorch's"
        for name in parts[0][0]:
            ours, plain, exact = ({name: torch.cat([part[i][name].reshape(-1) for part in parts])} for i in range(3))
            assert {t[0][name].dtype for t in parts} == {t[1][name].dtype for t in parts}, name
            lines = violations(ours, plain, exact, ours[name].dtype)
            if lines:
                found.setdefault(name, []).extend(f"{block}: {line}" for line in lines)
    return found


def subsets(names: list[str], count: int) -> list[tuple[str, ...]]:
    """Every set of one to `count` names."""
    return [s for n in range(1, count + 1) for s in itertools.combinations(names, n)]
