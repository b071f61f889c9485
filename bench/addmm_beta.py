"""Does `addmm_` with beta=1 cost more than with beta=0? Whether an accumulating epilogue of the BLAS is free.

A LoRA layer can write its low-rank term first and let the base product accumulate on it (beta=1: the output is read
once more by the epilogue) or compute the base product alone (beta=0). Both directions of each shape: forward x·Wᵀ
[M,N] and backward dy·W [M,K]. Variants are interleaved, the L2 cache is cold; medians with p20 and p80. The JSON file is
complete after each row.

    PYTHONPATH=. python bench/addmm_beta.py [--quick] [--json FILE] [--device cpu|cuda] [--repeats N]

`--quick` takes one or two small sizes: seconds on a GPU, and it runs on a CPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.commands.timing import Timing, interleaved

LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
QWEN_7B = ((3584, 3584), (3584, 512), (3584, 18944), (18944, 3584))
SQUARE = ((8192, 8192),)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK_SHAPES, QUICK_TOKENS = (
    {"cpu": ((96, 64),), "cuda": ((4096, 4096), (4096, 14336))},
    {"cpu": (32,), "cuda": (8192,)},
)


@dataclass(frozen=True)
class Row:
    """One product out[M,columns] = left[M,inner]·right[inner,columns] at both betas, in seconds."""

    direction: str
    dtype: str
    M: int
    K: int
    N: int
    beta0: Timing
    beta1: Timing
    mm_add: Timing

    @property
    def ratio(self) -> float:
        return self.beta1.median / self.beta0.median

    @property
    def tflops(self) -> float:
        return 2 * self.M * self.K * self.N / self.beta0.median * 1e-12

    def as_dict(self) -> dict:
        return {**asdict(self), "ratio": self.ratio, "tflops": self.tflops}

    def __str__(self) -> str:
        times = "".join(f"{_microseconds(timing):>26}" for timing in (self.beta0, self.beta1, self.mm_add))
        shape = f"{self.K}→{self.N}"
        return f"{self.direction:9}{self.dtype:9}{self.M:>6} {shape:>12}{times}{self.ratio:>8.3f}{self.tflops:>9.1f}"


HEADER = (
    f"{'':9}{'dtype':9}{'M':>6} {'K→N':>12}{'mm(out=) µs (p20–p80)':>26}{'addmm_ beta=1':>26}{'mm, then add_':>26}"
    f"{'1 / 0':>8}{'TFLOP/s':>9}"
)


def variants(left: Tensor, right: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The product into a fixed output: overwriting, accumulating, and accumulating in two steps."""
    out = torch.zeros(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    product = torch.empty_like(out)
    return {
        "beta0": lambda: torch.mm(left, right, out=out),
        # alpha keeps repeated accumulation from overflowing float16; it costs nothing, the epilogue has it anyway
        "beta1": lambda: out.addmm_(left, right, alpha=1e-3),
        "mm_add": lambda: out.add_(torch.mm(left, right, out=product), alpha=1e-3),
    }


def check(left: Tensor, right: Tensor) -> None:
    """Raise if accumulating gives another product than overwriting: a wrong result has no speed."""
    base = torch.ones(left.shape[0], right.shape[1], dtype=left.dtype, device=left.device)
    exact = left.double() @ right.double()
    for name, got in (("mm", torch.mm(left, right).double()), ("addmm_", base.addmm_(left, right).double() - 1)):
        error = ((got - exact).norm() / exact.norm()).item()
        limit = 8 * torch.finfo(left.dtype).eps
        if not error <= limit:
            raise RuntimeError(f"{name}: relative error {error:.3g}, expected at most {limit:.3g}")


def measure(device: torch.device, shapes: tuple[tuple[int, int], ...], tokens: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """A row for every dtype, shape, number of tokens and direction, as it is measured."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)

    for name, dtype in DTYPES.items():
        for K, N in shapes:
            W = draw(N, K, dtype, K**-0.5)
            for M in tokens:
                for direction, left, right in (("forward", draw(M, K, dtype), W.T), ("backward", draw(M, N, dtype), W)):
                    check(left[:64], right)
                    timings = interleaved(variants(left, right), repeats, warmup=3, device=device)
                    yield Row(direction, name, M, K, N, **timings)


def main() -> int:
    """Print the table and write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one or two sizes only")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows as JSON to FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds of each row (default: 20)")
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes = QUICK_SHAPES[device.type] if options.quick else LLAMA_8B + QWEN_7B + SQUARE
    tokens = QUICK_TOKENS[device.type] if options.quick else TOKENS
    header = environment()
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'the CPU'}")
    print(HEADER)
    rows = []
    for row in measure(device, shapes, tokens, options.repeats):
        print(row, flush=True)
        rows.append(row.as_dict())
        if options.json:
            found = {"header": header, "device": str(device), "rows": rows}
            write_whole(options.json, json.dumps(found, indent=2) + "\n", "--json")
    return 0


def _microseconds(timing: Timing) -> str:
    return f"{timing.median * 1e6:,.1f} ({timing.p20 * 1e6:,.1f}–{timing.p80 * 1e6:,.1f})"


if __name__ == "__main__":
    sys.exit(main())
