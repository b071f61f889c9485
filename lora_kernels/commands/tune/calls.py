"""The calls that tuning times: each kernel alone, and each dataflow's part that differs from the other's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...cases.linear import Case, Problem

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
    case = Case(M, K, N, R, P, bias=False, dtype=x, adapter_dtype=adapters, needs=("x", "A", "B"), seed=SEED, device=device)
    return case.draw(torch.Generator(device).manual_seed(SEED))


def kernel_call(kernel: str, problem: Problem) -> Callable[[], object]:
    """One call of a kernel over `problem`'s tensors; a product in both directions."""
    from ...backends.triton.kernels import lowrank_product
    from ...backends.triton.kernels.grad_dy import grad_dy
    from ...backends.triton.kernels.grad_x import grad_x
    from ...backends.triton.kernels.prefill import prefill
    from ...backends.triton.kernels.project import project

    x, W, A, B, dy, h, dropout = _tensors(problem)
    return {
        "project": lambda: project(x, (A,), dropout),
        "prefill": lambda: prefill(h, B, 2.0, None, x.dtype),
        "grad_dy": lambda: grad_dy(dy, h, B, 2.0, need_g=True, need_B=True, need_c=False),
        "grad_x": lambda: grad_x(x, (h,), (A,), dropout, x.dtype, need_x=True, need_As=(True,)),
    }.get(kernel) or (lambda: (lowrank_product.forward(x, W, h, B, 2.0, None), lowrank_product.backward(dy, W, h, A, dropout)))


def flow_calls(direction: str, problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """The two ways to a product with its low-rank term. Backward, dA is in both: prefill shares its pass over x."""
    from ...backends.products import add_product
    from ...backends.triton.kernels import lowrank_product
    from ...backends.triton.kernels.grad_x import grad_x
    from ...backends.triton.kernels.prefill import prefill

    x, W, A, B, dy, h, dropout = _tensors(problem)

    def backward(in_one_kernel: bool) -> None:
        dx, _ = grad_x(x, (h,), (A,), dropout, x.dtype, not in_one_kernel, (True,))
        if dx is None:
            lowrank_product.backward(dy, W, h, A, dropout)
        else:
            add_product(dx, dy, W)

    if direction == "forward":
        yield "prefill", lambda: add_product(prefill(h, B, 2.0, None, x.dtype), x, W.T)
        yield "lowrank_product", lambda: lowrank_product.forward(x, W, h, B, 2.0, None)
    else:
        yield "prefill", lambda: backward(in_one_kernel=False)
        yield "lowrank_product", lambda: backward(in_one_kernel=True)


def _tensors(problem: Problem) -> tuple[Any, ...]:
    """x, W, A, B, dy, an h that stands for drop(x)·Aᵀ, and the dropout."""
    x, A, B = (t.detach() for t in (problem.x, problem.A, problem.B))
    return x, problem.W, A, B, problem.dy, x.new_ones(len(x), problem.r, dtype=A.dtype), problem.dropout()
