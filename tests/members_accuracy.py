"""The tolerance rule over cases of several members (lora_kernels.cases.members), as accuracy.py has it for one."""

from collections.abc import Callable

import pytest
import torch
from accuracy import run
from kinds import KINDS

from lora_kernels.cases.members import DRAWS, MembersCase, MembersProblem, ours, plain, truth
from lora_kernels.cases.rule import Results, violations_on_average
from lora_kernels.values import flatten

every_kind = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.backend in ("torch", "cpu")], ids=str, indirect=True
)
every_dtype = pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS if kind.backend in ("torch", "cpu") for dtype in kind.dtypes],
    ids=str,
    indirect=["kind"],
)


def check(case: MembersCase, compute: Callable[[MembersProblem], Results] = ours) -> None:
    """Assert the rule, that dtypes are PyTorch's, and that no input was written to.

    A case that breaks the rule is drawn again, and its average errors are judged: of a few draws, and where these break it, of
    many.
    """
    draws: list[tuple[Results, Results, Results]] = []
    for count in (1, 6, DRAWS):
        draws += [draw_and_run(case, compute) for _ in range(count - len(draws))]
        if not (broken := violations_on_average(draws, case.read_dtype)):
            return
    raise AssertionError(f"{case}: {broken}")


def draw_and_run(case: MembersCase, compute: Callable[[MembersProblem], Results] = ours) -> tuple[Results, Results, Results]:
    """(tested, PyTorch's, exact) results of one draw."""
    problem = case.draw()
    return run(problem, {**problem.tensors(), **problem.dys}, compute, plain, truth)


def saved_bytes(problem: MembersProblem) -> tuple[int, bool]:
    """(bytes that autograd saves beside x and the members' own tensors, each storage once; whether x is saved)."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        problem.case.call(problem.x, problem.members)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed}
    tensors = flatten((problem.x, tuple(problem.members.values()))).tensors
    inputs = {t.untyped_storage().data_ptr() for t in tensors}
    extra = sum(size for place, size in storages.items() if place not in inputs)
    return extra, problem.x.untyped_storage().data_ptr() in storages
