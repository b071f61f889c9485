"""The tolerance rule over lora_kernels.cases.linear: through the public function, and through a backend's own two functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear
from lora_kernels.cases.linear import LETTERS, Case, Problem, ours, plain, truth
from lora_kernels.cases.rule import Results, errors, violations
from lora_kernels.functional.linear import kept
from lora_kernels.operation import prepared
from lora_kernels.plan import choose, describe, use_backend
from lora_kernels.reference import linear as reference
from lora_kernels.values import Needs

__all__ = ["Case", "Problem", "check", "check_contract", "contract", "errors", "ours", "plain", "truth", "violations"]
DRAWS, TINY_RESULT = (8, 32), 32  # draws of a case that has a result, or h and g, of fewer elements


def check(case: Case, compute: Callable[[Problem], Results] = ours) -> None:
    """Assert the rule for lora_linear, that dtypes are PyTorch's, and that no input was written to.

    The error of a result of few elements is luck, above all where its terms cancel, and h and g, of M·R elements, are in every
    result; so is the largest error, where one element decides. A case with such a result, or with an error, is drawn several
    times and judged over all its draws, the first among them, and over more of them where these have an error: luck does not
    last, a mistake does.
    """
    judged: list[tuple[Results, Results, Results]] = []
    for draws in (1, *DRAWS):
        judged += [_draw_and_run(case, compute) for _ in range(draws - len(judged))]
        results = [{name: torch.cat([r[name] for r in each]) for name in each[0]} for each in zip(*judged, strict=True)]
        broken = violations(*results, case.read_dtype)
        sizes = (case.rows * case.R, *(t.numel() for t in judged[0][2].values()))
        if not broken and (draws > 1 or not any(0 < size < TINY_RESULT for size in sizes)):
            return
    raise AssertionError(f"{case}: {broken}")


def _draw_and_run(case: Case, compute: Callable[[Problem], Results]) -> tuple[Results, Results, Results]:
    problem = case.draw()
    return run(problem, {name: t for name, t in vars(problem).items() if isinstance(t, Tensor)}, compute, plain, truth)


def run(problem: Any, tensors: dict[str, Tensor], *functions: Callable[[Any], Results]) -> tuple[Results, Results, Results]:
    """(tested, PyTorch's, exact) results of a problem, by three functions of it; its tensors are not to be written to."""
    compute, plain, truth = functions
    before = {name: t.detach().clone() for name, t in tensors.items()}
    with nan_in_fresh_memory():
        tested = compute(problem)
    expected, exact = plain(problem), truth(problem)
    assert {name: (t.dtype, t.shape) for name, t in tested.items()} == {
        name: (t.dtype, t.shape) for name, t in expected.items()
    }
    assert all(torch.equal(t, before[name]) for name, t in tensors.items()), "an input was written to"
    return tested, expected, exact


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """torch.empty holds NaN: an element that nothing writes is seen, where stale memory may hold the right value."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: Any, **options: Any) -> Tensor:
        tensor = allocate(*args, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocate_nan


# ---- the contract: a backend's forward and backward, without autograd ----


def contract(problem: Problem) -> Results:
    """y, h and the wanted gradients of the backend that is set; backward is given only what they must read."""
    x, member, dropout = problem.x.detach(), problem.member(), problem.dropout()
    x, dy = x.reshape(-1, x.shape[-1]), problem.dy.reshape(-1, problem.dy.shape[-1])
    plan = choose(describe("linear", use_backend.current, x.dtype, x, (member,), dropout, ()))
    needs = Needs("x" in problem.leaves, (tuple(LETTERS[name] for name in problem.leaves if name != "x"),))
    with nan_in_fresh_memory(), torch.no_grad():
        (y,), (h, *beside) = plan.forward(x, (member,), dropout)
        x, members, saved, dropout = kept(x, (member,), (h, *beside), dropout, needs)
        dx, (found,) = plan.backward((dy,), x, members, saved, dropout, needs)
    assert (dx is not None) == needs.x
    assert set(found) == set(needs.members[0])
    gradients = {f"d{name}": dx if name == "x" else found[LETTERS[name]] for name in problem.leaves}
    return {"y": y, "h": h, **gradients}


def expected_contract(problem: Problem) -> Results:
    """The same by the reference, h among the results, in the dtypes of the contract."""
    results = plain(problem)
    _, (h, *_) = reference.forward(problem.x.detach(), (problem.member(),), problem.dropout())
    return {"y": results.pop("y"), "h": h.detach(), **results}


def check_contract(problem: Problem, results: Results | None = None, *, fresh: bool = False) -> None:
    """Assert the rule and the contract's dtypes for a backend's own functions; results: of them, if at hand.

    fresh: it is as its case draws it, and is judged with further draws where it breaks the rule, as in `check`.
    """
    results = contract(problem) if results is None else results
    for name, tensor in results.items():
        adapters = problem.A.dtype if name in ("h", "dA", "dB") else torch.float32 if name in ("dc", "dm") else problem.x.dtype
        assert tensor.dtype == adapters, f"{name}: {tensor.dtype}, expected {adapters}"
    broken = broken_results(problem, results)
    if broken and fresh:
        more = [(drawn, contract(drawn)) for drawn in (problem.case.draw() for _ in range(DRAWS[0] - 1))]
        broken = broken_results(problem, results, *more)
    assert not broken, broken


def broken_results(problem: Problem, results: Results, *more: tuple[Problem, Results]) -> dict[str, list[str]]:
    """The results that break the rule, and how, over all of these draws."""
    draws = [(drawn, expected_contract(of), exact_contract(of)) for of, drawn in ((problem, results), *more)]
    tested, expected, exact = ({name: torch.cat([draw[i][name] for draw in draws]) for name in results} for i in range(3))
    read = {name: problem.x.dtype if name == "dm" else t.dtype for name, t in results.items()}  # dm reads v, which is as y is
    found = {
        name: violations({name: tested[name]}, {name: expected[name]}, {name: exact[name]}, read[name]) for name in results
    }
    return {name: lines for name, lines in found.items() if lines}


def exact_contract(problem: Problem) -> Results:
    """The truth, h with it."""
    wide = problem.dequantized()
    _, (h, *_) = reference.forward(wide.x.detach().double(), (wide.member()._replace(**_double(wide)),), wide.dropout())
    return {"h": h, **truth(problem)}


def _double(problem: Problem) -> dict[str, Tensor]:
    fields = {LETTERS[name]: t for name, t in problem.inputs.items() if name != "x" and t is not None}
    return {name: t.detach().double() for name, t in fields.items()}


# ---- what the public function must do however it computes ----


def gradients_asked(monkeypatch: pytest.MonkeyPatch) -> list[Needs]:
    """A list that grows by what each backward pass from here on is to compute."""
    asked: list[Needs] = []
    choose = prepared.choose

    def spying(call: Any) -> Any:
        plan = choose(call)
        return plan._replace(backward=lambda *args: asked.append(args[5]) or plan.backward(*args))

    monkeypatch.setattr(prepared, "choose", spying)
    return asked


def check_checkpoint(problem: Problem, use_reentrant: bool) -> None:
    """Assert that torch.utils.checkpoint changes no bit of the gradients, dropout's drawn mask included."""
    leaves = list(problem.leaves.values())

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, *list(problem.inputs.values())[1:], dropout_p=0.4)

    gradients = []
    for compute in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        for leaf in leaves:
            leaf.grad = None
        compute(problem.x).backward(problem.dy)
        gradients.append([leaf.grad.clone() for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
