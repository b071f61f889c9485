"""The tolerance rule over lora_kernels.cases.conv2d."""

import torch
from accuracy import run

from lora_kernels.cases.conv2d import Case, ours, plain, truth
from lora_kernels.cases.rule import violations

DRAWS = 4  # results of so small a case have few elements, and the error of few is luck


def broken(case: Case) -> list[str]:
    """What of lora_conv2d's results breaks the rule over some draws, a line each."""
    judged = []
    for _ in range(DRAWS):
        problem = case.draw()
        tensors = {name: t for name, t in problem.tensors.items() if t is not None}
        judged.append(run(problem, tensors, ours, plain, truth))
    results = [
        {name: torch.cat([draw[name].flatten() for draw in draws]) for name in draws[0]} for draws in zip(*judged, strict=True)
    ]
    return violations(*results, case.autocast or case.dtype)
