"""The calls that tuning times: each kernel alone, and each dataflow's part that differs from the other's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..accuracy_gate import Problem

DTYPES = {"16": (torch.bfloat16, torch.bfloat16), "mixed": (torch.bfloat16, torch.float32)}
RANK = {32: 16, 64: 64}  # the rank at which a class is measured
P, SEED = 0.1, 1


@dataclass(frozen=True)
class Sizes:
    """M of the tiles' cases; the other sizes by class, `width` where no class says which."""

    M: int = 8192
    width: int = 4096
    contractions: tuple[int, ...] = (4096, 8192, 14336)
    tokens: tuple[int, ...] = (512, 8192)
    repeats: int = 20


def draw(M: int, K: int, N: int, R: int, arithmetic: str, device: torch.device) -> Problem:
    """x[M,K] and W[N,K] with adapters of rank R, in the dtypes of the class `arithmetic`."""
    x, adapters = DTYPES[arithmetic]
    return Problem.draw(M, K, N, R, P, x, device, SEED).with_adapters(adapters)


def kernel_call(kernel: str, problem: Problem) -> Callable[[], object]:
    """One call of a kernel over `problem`'s tensors; a fused product in both directions."""
    from ...backends.torch.linear import Needs
    from ...backends.triton import backward, forward, gemm

    x, W, A, B, dy, h, seed = _tensors(problem)
    both = Needs(True, True, False, False)
    return {
        "project": lambda: forward.project(x, A, P, seed),
        "prefill": lambda: forward.prefill(h, B, 2.0, None, x.dtype),
        "grad_dy": lambda: backward.grad_dy(dy, h, B, 2.0, Needs(True, True, True, False)),
        "grad_x": lambda: backward.grad_x(x, h, A, P, seed, both, x.dtype),
    }.get(kernel) or (lambda: (gemm.forward(x, W, h, B, 2.0, None), gemm.backward(dy, W, h, A, P, seed)))


def flow_calls(direction: str, problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """The two ways to a product with its low-rank term. Backward, dA is in both: prefill shares its pass over x."""
    from ...backends.torch.linear import Needs, add_product
    from ...backends.triton import backward, forward, gemm

    x, W, A, B, dy, h, seed = _tensors(problem)
    both, only_dA = Needs(True, True, False, False), Needs(False, True, False, False)
    if direction == "forward":
        yield "prefill", lambda: add_product(forward.prefill(h, B, 2.0, None, x.dtype), x, W.T)
        yield "fused", lambda: gemm.forward(x, W, h, B, 2.0, None)
        return

    def prefill() -> None:
        dx, _ = backward.grad_x(x, h, A, P, seed, both, x.dtype)
        add_product(dx, dy, W)  # type: ignore[arg-type]

    yield "prefill", prefill
    yield "fused", lambda: (backward.grad_x(x, h, A, P, seed, only_dA, x.dtype), gemm.backward(dy, W, h, A, P, seed))


def _tensors(problem: Problem) -> tuple[torch.Tensor, ...]:
    """x, W, A, B, dy, an h that stands for drop(x)·Aᵀ, and the seed of the dropout."""
    x, A = problem.x.detach(), problem.A
    h = x.new_ones(len(x), problem.r, dtype=A.dtype)
    return x, problem.W, A, problem.B, problem.dy, h, torch.full((), SEED, dtype=torch.int64, device=x.device)
