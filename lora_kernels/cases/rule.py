"""The one tolerance rule: err <= 1.5 · err(plain PyTorch at that dtype) + tiny, for each output and gradient apart.

err is ‖· − truth‖ / ‖truth‖, and also the largest element error over the largest magnitude; truth is float64. Of a result of
few elements plain PyTorch's error is luck: there it counts as at least half a unit in the last place.
"""

import torch
from torch import Tensor

MARGIN = 1.5
# tiny, in epsilons of the output's dtype, by norm and for the largest element
TINY = {torch.bfloat16: (1 / 16, 1 / 4), torch.float16: (1 / 16, 1 / 4), torch.float32: (2, 2), torch.float64: (64, 64)}
FEW = 1024  # elements

Results = dict[str, Tensor]


def violations(tested: Results, plain: Results, exact: Results, dtype: torch.dtype) -> list[str]:
    """What in `tested` breaks the rule, a line each: against the float64 `exact` and plain PyTorch at `dtype`."""
    lines = []
    for name, value in exact.items():
        if tested[name].shape != value.shape:
            lines.append(f"{name}: got shape {tuple(tested[name].shape)}, expected {tuple(value.shape)}")
            continue
        broken = judge(errors(tested[name], value), errors(plain[name], value), value.numel(), dtype)
        lines += [f"{name}: {line}" for line in broken]
    return lines


def violations_on_average(draws: list[tuple[Results, Results, Results]], dtype: torch.dtype) -> list[str]:
    """What in (tested, plain, exact) results of many draws of a case breaks the rule by the average of its errors.

    One draw may by luck: where results are few, or made of one another, as those of an MLP.
    """
    lines = []
    for name, value in draws[0][2].items():
        own, theirs = (
            tuple(torch.tensor([errors(draw[i][name], draw[2][name]) for draw in draws]).mean(0).tolist()) for i in (0, 1)
        )
        lines += [f"{name}: on average {line}" for line in judge(own, theirs, value.numel(), dtype)]
    return lines


def judge(tested: tuple[float, float], plain: tuple[float, float], size: int, dtype: torch.dtype) -> list[str]:
    """What of a result of `size` elements breaks the rule, by its `errors` and plain PyTorch's."""
    lines, eps = [], torch.finfo(dtype).eps
    half_unit = eps / 2 if size < FEW else 0.0
    for kind, error, reference, tiny in zip(("norm", "max"), tested, plain, TINY[dtype], strict=True):
        if not error <= MARGIN * max(reference, half_unit) + tiny * eps:  # NaN breaks it too
            lines.append(f"{kind} error {error:.3g}, PyTorch's is {reference:.3g}")
    return lines


def errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    """(‖value − exact‖ / ‖exact‖, max |value − exact| / max |exact|); the absolute error where `exact` is zero."""
    if not exact.numel():
        return 0.0, 0.0
    difference = value.detach().to(exact.device).double() - exact
    norm, largest = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return difference.norm().item() / norm, difference.abs().max().item() / largest
