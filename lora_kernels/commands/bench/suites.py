"""What `lora-kernels bench` can time: one linear layer, or the linear layers of a decoder layer, on M tokens.

linear   y = layer(x)
qkv      q(x), k(x), v(x)
mlp      down(silu(gate(x)) · up(x))
decoder  qkv(x), o(a), mlp(z): the seven linear layers, without attention and norms
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...cases.linear import Case
from ...dtypes import dtype_name
from ..console import CommandError

BOTH, FORWARD = "forward+backward", "forward"  # the passes that are timed


@dataclass(frozen=True)
class Shape:
    """A linear layer K -> N, or a block of them: K hidden, N intermediate and `kv` key-value features."""

    K: int
    N: int
    block: str = "linear"
    kv: int = 0

    def layers(self) -> dict[str, tuple[int, int]]:
        """(in-features, out-features) of each linear layer by name, in the order of a call."""
        qkv = {"q": (self.K, self.K), "k": (self.K, self.kv), "v": (self.K, self.kv)}
        mlp = {"gate": (self.K, self.N), "up": (self.K, self.N), "down": (self.N, self.K)}
        return {
            "linear": {"linear": (self.K, self.N)},
            "qkv": qkv,
            "mlp": mlp,
            "decoder": {**qkv, "o": (self.K, self.K), **mlp},
        }[self.block]

    def __str__(self) -> str:
        if self.block == "linear":
            return f"{self.K}→{self.N}"
        sizes = {"qkv": (self.K, self.kv), "mlp": (self.K, self.N), "decoder": (self.K, self.kv, self.N)}
        return f"{self.block} {'/'.join(map(str, sizes[self.block]))}"


@dataclass(frozen=True)
class Workload:
    """`shape` with adapters of rank R and dropout p on M tokens; `passes` is BOTH or FORWARD (evaluation mode); dora: DoRA."""

    M: int
    shape: Shape
    R: int
    p: float
    dtype: torch.dtype
    passes: str = BOTH
    dora: bool = False

    def __str__(self) -> str:
        return f"{self.shape} M={self.M} r={self.R} p={self.p} {dtype_name(self.dtype)}{' DoRA' * self.dora}"

    def cases(self, device: torch.device | None = None, seed: int = 0) -> dict[str, Case]:
        """The case of each linear layer by name."""
        on = device or torch.device("cpu")
        about: dict[str, Any] = {"M": self.M, "R": self.R, "p": self.p, "dtype": self.dtype, "device": on, "seed": seed}
        about |= {"dora": self.dora, "needs": ("x", "A", "B", *"m" * self.dora)}
        layers = self.shape.layers().items()
        return {name: Case(K=K, N=N, bias=False, **about) for name, (K, N) in layers}

    def flops(self, adapted: bool) -> int:
        return sum(case.flops(self.passes == BOTH, adapted) for case in self.cases().values())

    def bytes(self) -> int:
        return sum(case.bytes(self.passes == BOTH) for case in self.cases().values())


@dataclass(frozen=True)
class Suite:
    """What a run times: every combination of its axes."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    ranks: tuple[int, ...]
    dropouts: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    passes: str = BOTH
    dora: bool = False

    def workloads(self) -> Iterator[Workload]:
        axes = (self.dtypes, self.dropouts, self.ranks, self.tokens, self.shapes)
        for dtype, p, R, M, shape in itertools.product(*axes):
            yield Workload(M, shape, R, p, dtype, self.passes, self.dora)


def _linears(*shapes: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(K, N) for K, N in shapes)


def _blocks(hidden: int, kv: int, intermediate: int) -> tuple[Shape, ...]:
    return tuple(Shape(hidden, intermediate, block, kv) for block in ("qkv", "mlp", "decoder"))


LLAMA_8B = _linears((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # q,o  k,v  gate,up  down
LLAMA_70B = _linears((8192, 8192), (8192, 1024), (8192, 28672), (28672, 8192))
QWEN = _linears((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584), (5120, 5120), (5120, 27648))  # 7B and 32B
SMOLLM = _linears((576, 576), (576, 192), (576, 1536), (1536, 576))
BF16, FP32 = (torch.bfloat16,), (torch.float32,)
SUITES = {
    "small": Suite(_linears((2048, 2048)), (2048,), (8,), (0.1,), FP32),
    "smollm": Suite(SMOLLM, (512, 2048), (8,), (0.0, 0.1), FP32),
    "llama": Suite(LLAMA_8B, (2048, 8192), (16,), (0.0, 0.1), BF16),
    "llama-70b": Suite(LLAMA_70B, (2048, 8192), (16,), (0.0, 0.1), BF16),
    "qwen": Suite(QWEN, (2048, 8192), (16,), (0.0, 0.1), BF16),
    "tokens": Suite(LLAMA_8B[:1], (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 4096, 16384), (16,), (0.0, 0.1), BF16),
    "ranks": Suite(LLAMA_8B[:1], (8192,), (8, 16, 64, 128), (0.0, 0.1), BF16),
    "decoder": Suite(_blocks(4096, 1024, 14336), (8192,), (16,), (0.0, 0.1), BF16),
    "decoder-small": Suite(_blocks(576, 192, 1536), (512,), (8,), (0.0, 0.1), FP32),
}


def choose_suite(name: str, device: torch.device, passes: str = BOTH, dora: bool = False, **axes: tuple[Any, ...]) -> Suite:
    """The suite `name` ("auto": llama on a GPU, small on a CPU) with the axes that are given in place of its own.

    The forward pass alone is that of evaluation mode, without dropout. Raises CommandError for an unknown suite, and with dora
    for one of blocks.
    """
    if name == "auto":
        name = "llama" if device.type == "cuda" else "small"
    if name not in SUITES:
        raise CommandError(f"--suite: got {name!r}, expected one of {', '.join(('auto', *SUITES))}")
    if passes == FORWARD:
        axes["dropouts"] = (0.0,)
    suite = replace(SUITES[name], passes=passes, dora=dora, **{axis: values for axis, values in axes.items() if values})
    if dora and any(shape.block != "linear" for shape in suite.shapes):
        raise CommandError(f"--suite: {name} times blocks, and --variant dora single layers; pass another suite, or --shape")
    return suite
