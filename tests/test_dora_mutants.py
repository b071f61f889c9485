"""Wrong arithmetic in DoRA's magnitude that the tolerance rule must catch, in PyTorch's steps around a layer."""

import pytest
import torch
from accuracy import Case, ours, plain, truth, violations

from lora_kernels import use_backend
from lora_kernels.backends import magnitude
from lora_kernels.backends.torch import linear
from lora_kernels.operation import prepared

STEPS = linear.STEPS
norm, scale, scale_backward = STEPS


def steps(**changed):
    """PyTorch's steps with others in their place."""
    return lambda monkeypatch: monkeypatch.setattr(linear, "STEPS", STEPS._replace(**changed))


def gradient(index, change):
    """One of scale_backward's results, changed by change(value, dy, v, m, n)."""

    def changed(dy, v, m, n, *needed):
        found = list(scale_backward(dy, v, m, n, *needed))
        found[index] = change(found[index], dy, v, m, n)
        return tuple(found)

    return steps(scale_backward=changed)


def saved(number, change):
    """What forward saves at this place, h, v or n, changed."""
    original = magnitude.around

    def changed(*args):
        forward, backward = original(*args)

        def run(*args):
            ys, kept = forward(*args)
            return ys, tuple([change(t) if i == number else t for i, t in enumerate(kept)])

        return run, backward

    return lambda monkeypatch: monkeypatch.setattr(magnitude, "around", changed)


MUTANTS = {
    "the norm of W alone": steps(norm=lambda W, A, B, s, dtype: norm(W, A, B * 0, s, dtype)),
    "the norm without scaling": steps(norm=lambda W, A, B, s, dtype: norm(W, A, B, 1.0, dtype)),
    "the norm's last row": steps(norm=lambda *args: torch.cat([norm(*args)[:-1], norm(*args)[-2:-1]])),
    "a squared norm": steps(norm=lambda *args: norm(*args) ** 2),
    "the bias scaled": steps(scale=lambda v, m, n, c: scale(v + c, m, n, None)),
    "no bias": steps(scale=lambda v, m, n, c: scale(v, m, n, None)),
    "m for m / n": steps(scale=lambda v, m, n, c: scale(v, m, n * 0 + 1, c)),
    "dv not scaled": gradient(0, lambda dv, dy, v, m, n: dy),
    "dv by 1 / n": gradient(0, lambda dv, dy, v, m, n: (dv / m).to(dy.dtype)),
    "dm without 1 / n": gradient(1, lambda dm, dy, v, m, n: dm * n),
    "dm of m·v": gradient(1, lambda dm, dy, v, m, n: dm * m),
    "dc scaled": gradient(2, lambda dc, dy, v, m, n: dc * m / n),
    "v saved 1 % large": saved(1, lambda v: v * 1.01),
    "n saved 1 % large": saved(2, lambda n: n * 1.01),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, dtype, monkeypatch):
    problem = Case(M=33, K=40, N=50, R=6, p=0.2, scaling=0.5, dtype=dtype, needs=tuple("xABcm"), dora=True).draw()
    expected, exact = plain(problem), truth(problem)
    with use_backend("torch"):
        assert not violations(ours(problem), expected, exact, dtype)
        MUTANTS[name](monkeypatch)
        monkeypatch.setattr(prepared, "_kinds", {})
        assert violations(ours(problem), expected, exact, dtype)
