"""What a call costs the host: the time of the same layers at sizes at which neither kernels nor products take any.

At small sizes, and on a fast GPU at quite large ones, this and not the arithmetic is what a step waits for.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..timing import least
from . import peers
from .blocks import BlockProblem
from .suites import Workload

TOKENS, FEATURES = 8, 64


def host_times(
    case: Workload, names: tuple[str, ...], device: torch.device, lorafusion: Path | None = None
) -> dict[str, float]:
    """Seconds of a call by variant, for all of `names` but compiled ones, whose compilation takes longer than the rest."""
    shape = replace(case.shape, K=FEATURES, N=FEATURES, kv=FEATURES if case.shape.kv else 0)
    plain = tuple(name for name in names if name != "peft-compile" and peers.why_not_here(name, case) is None)
    return _host_times(replace(case, M=TOKENS, shape=shape), plain, device, lorafusion)


@functools.cache  # cases that differ in their sizes alone cost the host the same
def _host_times(tiny: Workload, names: tuple[str, ...], device: torch.device, lorafusion: Path | None) -> dict[str, float]:
    problem = BlockProblem.draw(tiny, device, seed=0)
    steps: dict[str, Callable[[], Any]] = {}
    for name in names:
        for variant in peers.variants(name, problem, lorafusion):
            steps[variant.name] = problem.step(variant.module)
    return least(steps, device)
