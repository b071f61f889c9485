"""EGGROLL on this machine: a population's forward pass beside its members' one by one, and a training without gradients.

    PYTHONPATH=. python bench/populations.py times|training [--repeats N] [--json FILE]

times: eggroll_linear of P members with M rows each, beside the frozen layer on all of their rows and beside P layers with dense
perturbed weights, which are drawn, made and multiplied one after the other; medians of interleaved runs.
training: a network of sign activations, which have no gradient, is trained by its accuracy: that of each population on average.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from row_writing import write_rows
from torch import Tensor, nn

from lora_kernels import Eggroll, eggroll_linear
from lora_kernels.commands.timing import interleaved
from lora_kernels.reference.eggroll import factors

SIGMA, SEED = 0.1, torch.tensor(1)
SIZES = ((64, 1, 576, 1536), (64, 16, 576, 1536), (64, 1, 2048, 2048), (64, 16, 2048, 2048), (256, 16, 576, 576))  # P, M, K, N
POINTS, POPULATION, STEPS = 400, 256, 200


def one_by_one(x: Tensor, W: Tensor, P: int) -> Tensor:
    """Each member with a weight of its own."""
    y = x.new_empty(P, len(x) // P, len(W))
    for i, rows in enumerate(x.view(P, -1, x.shape[1])):
        A, B = factors(slice(i // 2, i // 2 + 1), *W.shape, 1, SEED, 0)
        torch.mm(rows, torch.addmm(W, B[0].T, A[0], alpha=SIGMA if i % 2 == 0 else -SIGMA).T, out=y[i])
    return y.flatten(0, 1)


def times(P: int, M: int, K: int, N: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of each way, after they have agreed."""
    x, W = torch.randn(P * M, K), torch.randn(N, K) / K**0.5
    ways = {
        "one by one": lambda: one_by_one(x, W, P),
        "population": lambda: eggroll_linear(x, W, population=P, sigma=SIGMA, seed=SEED),
        "frozen": lambda: nn.functional.linear(x, W),
    }
    torch.testing.assert_close(ways["population"](), ways["one by one"](), rtol=1e-4, atol=1e-4)
    found = interleaved(ways, repeats=repeats)
    ms = {name: {part: 1e3 * value for part, value in vars(t).items() if part != "repeats"} for name, t in found.items()}
    ratio = found["one by one"].median / found["population"].median
    return {
        "members": P,
        "M": M,
        "K": K,
        "N": N,
        "ms": ms,
        "ratio": ratio,
        "times_frozen": found["population"].median / found["frozen"].median,
    }


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


def training(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """The mean accuracy of each step's population on points in a ring, and the model's own at the end."""
    torch.manual_seed(0)
    x = torch.randn(POINTS, 2)
    labels = ((x.norm(dim=1) > 0.7) & (x.norm(dim=1) < 1.6)).long()
    x = torch.cat([x, torch.ones(POINTS, 1)], 1).to(dtype)
    model = nn.Sequential(nn.Linear(3, 32), Sign(), nn.Linear(32, 2)).to(dtype)
    es = Eggroll(model, lambda weights: torch.optim.Adam(weights, lr=0.03), population=POPULATION, sigma=SIGMA, rank=rank)

    def accuracy(outputs: Tensor) -> Tensor:
        return (outputs.argmax(-1) == labels).float().mean(-1)

    curve = []
    for _ in range(STEPS):
        es.ask()
        fitness = accuracy(model(es.members(x)).view(POPULATION, POINTS, 2))
        es.tell(fitness)
        curve.append(round(fitness.mean().item(), 4))
    about = {"population": POPULATION, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    return {**about, "fitness": curve, "final": accuracy(model(x)).item(), "majority": labels.float().mean().item()}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("times", "training"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.what == "times":
        rows = (times(*size, options.repeats) for size in SIZES)
    else:
        rows = (training(*kind) for kind in ((1, torch.float32), (4, torch.float32), (1, torch.bfloat16)))
    write_rows(rows, options.json, lambda row: {name: value for name, value in row.items() if name != "fitness"})


if __name__ == "__main__":
    main(sys.argv[1:])
