"""The kinds of call that the matrix of tests runs over: a backend by name, and the base weight."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Kind(NamedTuple):
    backend: str
    quant_type: str | None

    def __str__(self) -> str:
        return f"{self.backend}-{self.quant_type or 'dense'}"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What this backend computes in; float64 not on a GPU's kernels."""
        return DTYPES if self.backend in ("torch", "cpu") else DTYPES[:3]


BACKENDS = {"torch": (None, "nf4"), "cpu": (None, "nf4"), "triton": (None, "nf4"), "cuda": ("nf4",)}
KINDS = tuple(Kind(backend, quant_type) for backend, quant_types in BACKENDS.items() for quant_type in quant_types)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str, indirect=True)
every_dense_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.quant_type is None], ids=str, indirect=True)


def every_dtype_of(kinds: Iterable[Kind]) -> pytest.MarkDecorator:
    """These kinds, each with every dtype that it computes in."""
    pairs = [(kind, dtype) for kind in kinds for dtype in kind.dtypes]
    return pytest.mark.parametrize(("kind", "dtype"), pairs, ids=str, indirect=["kind"])


every_dtype = every_dtype_of(KINDS)


def every_needs() -> pytest.MarkDecorator:
    """Every kind with every set of wanted gradients; a 4-bit weight has none."""
    pairs = []
    for kind in KINDS:
        own = "xWABc" if kind.quant_type is None else "xABc"
        sets = itertools.chain.from_iterable(itertools.combinations(own, n) for n in range(len(own) + 1))
        pairs += [pytest.param(kind, needs, id=f"{kind}-{''.join(needs)}") for needs in sets]
    return pytest.mark.parametrize(("kind", "needs"), pairs, indirect=["kind"])
