"""The tolerance rule over cases of several members (lora_kernels.cases.members), as accuracy.py has it for one."""

from collections.abc import Callable

import pytest
import torch
from accuracy import nan_in_fresh_memory
from kinds import KINDS

from lora_kernels.cases.members import MembersCase, MembersProblem, ours, plain, truth
from lora_kernels.cases.rule import Results, errors, judge, violations
from lora_kernels.values import flatten

MANY = 32  # draws

every_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.backend == "torch"], ids=str, indirect=True)
every_dtype = pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in KINDS if kind.backend == "torch" for dtype in kind.dtypes],
    ids=str,
    indirect=["kind"],
)


def check(case: MembersCase, compute: Callable[[MembersProblem], Results] = ours) -> None:
    """Assert the rule, that dtypes are PyTorch's, and that no input was written to.

    An error of e or u is in every result after it, and that of few elements is luck: a case that breaks the rule is drawn many
    times, and its average errors are judged.
    """
    draws = [draw_and_run(case, compute)]
    if violations(*draws[0], case.read_dtype):
        draws += [draw_and_run(case, compute) for _ in range(MANY - 1)]
        for name, value in draws[0][2].items():
            own, theirs = (
                tuple(torch.tensor([errors(draw[i][name], draw[2][name]) for draw in draws]).mean(0).tolist()) for i in (0, 1)
            )
            broken = judge(own, theirs, value.numel(), case.read_dtype)
            assert not broken, f"{case}: {name}: {broken} on average"


def draw_and_run(case: MembersCase, compute: Callable[[MembersProblem], Results] = ours) -> tuple[Results, Results, Results]:
    """(tested, PyTorch's, exact) results of one draw."""
    problem = case.draw()
    tensors = {**problem.tensors(), **problem.dys}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    with nan_in_fresh_memory():
        tested = compute(problem)
    expected, exact = plain(problem), truth(problem)
    assert {name: (t.dtype, t.shape) for name, t in tested.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    assert all(torch.equal(t, before[name]) for name, t in tensors.items()), "an input was written to"
    return tested, expected, exact


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
