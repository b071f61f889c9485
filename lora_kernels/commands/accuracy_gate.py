"""The one tolerance rule, and the benchmark's gate that applies it: no speed is reported for a wrong result.

Truth is float64 on the CPU. Every output and gradient must satisfy err <= 1.5 · err(plain PyTorch at that dtype)
+ tiny, both for ‖· − truth‖ / ‖truth‖ and for the largest element error over the largest magnitude. Of a result of few
elements plain PyTorch's error is luck: there it counts as at least half a unit in the last place.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional.linear import lora_linear
from ..mask import dropout_mask, keep_scale

MARGIN = 1.5
# tiny, in epsilons of the output's dtype, by norm and for the largest element: the values of the test suite's rule.
TINY = {torch.bfloat16: (1 / 16, 1 / 4), torch.float16: (1 / 16, 1 / 4), torch.float32: (2, 2), torch.float64: (64, 64)}
FEW = 1024  # elements
CHECKED_ROWS = 256  # rows of y and dx that meet the float64 product with W; all rows enter h, g, dA and dB


@dataclass(frozen=True)
class Problem:
    """x[M,K], W[N,K], A[R,K], B[N,R], dy[M,N], dropout p and the scaling of one layer; unlike at init B is not zero."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    p: float

    lora_alpha_over_r = 2

    @classmethod
    def draw(cls, M: int, K: int, N: int, R: int, p: float, dtype: torch.dtype, device: torch.device, seed: int) -> "Problem":
        """Normal values, scaled so that y and dx have a size near one."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)

        x, dy = normal(M, K, 1.0).requires_grad_(), normal(M, N, 1.0)
        return cls(x, normal(N, K, K**-0.5), normal(R, K, K**-0.5), normal(N, R, R**-0.5), dy, p)

    @property
    def in_features(self) -> int:
        return self.W.shape[1]

    @property
    def out_features(self) -> int:
        return self.W.shape[0]

    @property
    def r(self) -> int:
        return self.A.shape[0]

    @property
    def lora_alpha(self) -> int:
        return self.lora_alpha_over_r * self.r

    def with_adapters(self, dtype: torch.dtype) -> "Problem":
        """The same problem with its adapters in `dtype`."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))


def gate(problem: Problem, seed: int, exact: dict[str, Tensor] | None = None, weight: Any = None) -> list[str]:
    """Why lora_linear's result for `problem` is not acceptable, a line for each output that fails; empty when it is.

    exact: `truth(problem, seed)` where the caller has it already. weight: what lora_linear gets in place of W, of its values.
    """
    exact = truth(problem, seed) if exact is None else exact
    x, A, B = problem.x, problem.A.clone().requires_grad_(), problem.B.clone().requires_grad_()
    W = problem.W if weight is None else weight
    rows = _checked_rows(problem)
    y = lora_linear(x, W, A, B, scaling=problem.lora_alpha_over_r, dropout_p=problem.p, seed=seed)
    tested = _outputs(y, (x, A, B), problem.dy, rows)
    plain = _outputs(_plain_forward(problem, A, B, _keep(problem, seed)), (x, A, B), problem.dy, rows)
    return violations(tested, plain, exact, problem.x.dtype)


def violations(tested: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """What in `tested` breaks the rule, a line each: against the float64 `exact` and plain PyTorch at `dtype`."""
    lines = []
    for name, value in exact.items():
        if tested[name].shape != value.shape:
            lines.append(f"{name}: got shape {tuple(tested[name].shape)}, expected {tuple(value.shape)}")
            continue
        eps = torch.finfo(dtype).eps
        half_unit = eps / 2 if value.numel() < FEW else 0.0
        pairs = zip(("norm", "max"), errors(tested[name], value), errors(plain[name], value), TINY[dtype], strict=True)
        for kind, error, reference, tiny in pairs:
            if not error <= MARGIN * max(reference, half_unit) + tiny * eps:  # NaN breaks it too
                lines.append(f"{name}: {kind} error {error:.3g}, PyTorch's is {reference:.3g}")
    return lines


def truth(problem: Problem, seed: int) -> dict[str, Tensor]:
    """dA, dB, and the checked rows of y and dx, in float64 on the CPU."""
    rows, keep = _checked_rows(problem), _keep(problem, seed).cpu()
    x, W, A, B, dy = (t.detach().cpu().double() for t in (problem.x, problem.W, problem.A, problem.B, problem.dy))
    s, factor = problem.lora_alpha_over_r, keep.double() * keep_scale(problem.p)
    dropped = x * factor
    h, g = dropped @ A.T, s * (dy @ B)
    return {
        "y": x[rows] @ W.T + s * (h[rows] @ B.T),
        "dx": dy[rows] @ W + (g[rows] @ A) * factor[rows],
        "dA": g.T @ dropped,
        "dB": s * (dy.T @ h),
    }


def _checked_rows(problem: Problem) -> Tensor:
    """At most CHECKED_ROWS row numbers, evenly spread, the first and the last among them."""
    M = problem.x.shape[0]
    return torch.linspace(0, M - 1, min(CHECKED_ROWS, M), dtype=torch.float64).round().long()


def _keep(problem: Problem, seed: int) -> Tensor:
    """The dropout mask, bool[M, K]."""
    x = problem.x
    return dropout_mask(x.shape[0], problem.in_features, problem.p, seed, device=x.device)


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """(‖value − exact‖ / ‖exact‖, max |value − exact| / max |exact|); the absolute error where `exact` is zero."""
    if not exact.numel():
        return 0.0, 0.0
    difference = value.detach().cpu().double() - exact
    norm, largest = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return difference.norm().item() / norm, difference.abs().max().item() / largest


def _plain_forward(problem: Problem, A: Tensor, B: Tensor, keep: Tensor) -> Tensor:
    """What one writes with PyTorch's own operations at these dtypes."""
    dropped = problem.x.to(A.dtype) * keep * keep_scale(problem.p)
    low_rank = problem.lora_alpha_over_r * F.linear(F.linear(dropped, A), B)
    return F.linear(problem.x, problem.W) + low_rank.to(problem.x.dtype)


def _outputs(y: Tensor, inputs: tuple[Tensor, ...], dy: Tensor, rows: Tensor) -> dict[str, Tensor]:
    dx, dA, dB = torch.autograd.grad(y, inputs, dy)
    on_rows = rows.to(y.device)
    return {"y": y.detach()[on_rows], "dx": dx[on_rows], "dA": dA, "dB": dB}
