"""Choice of the backend: requests, refusals with a reason, who computes the backward pass, importing without GPU or Triton."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from kinds import KINDS, every_kind

import lora_kernels
from lora_kernels import LoRAWeights, backend_report, lora_linear, plan, use_backend
from lora_kernels.backends.torch import linear as pytorch
from lora_kernels.cases.linear import Case


def compute():
    return lora_linear(*list(Case(needs=()).draw().inputs.values())[:4])


@pytest.fixture
def fussy(monkeypatch):
    """A stand-in for the triton backend that computes like PyTorch's, but only with a multiple of 8 features."""
    calls = []

    def forward(*args):
        calls.append("forward")
        return pytorch.forward(*args)

    def backward(*args):
        calls.append("backward")
        return pytorch.backward(*args)

    def plan_of(call):
        K = call.x.shape[-1]
        return f"{K} features are not a multiple of 8" if K % 8 else plan.Plan("triton", "it is fussy", forward, backward)

    backend = SimpleNamespace(FIELDS=pytorch.FIELDS, plan=plan_of, calls=calls)
    monkeypatch.setitem(plan.BACKENDS, "triton", lambda operation: backend)
    plan.load.cache_clear()
    yield backend
    plan.load.cache_clear()


def test_auto_takes_the_first_that_can(fussy):
    compute()
    assert fussy.calls == ["forward"]
    lora_linear(torch.ones(2, 9), torch.ones(3, 9), torch.ones(1, 9), torch.ones(3, 1))
    assert fussy.calls == ["forward"]


def test_a_named_backend_is_used_or_raises(fussy):
    with use_backend("torch"):
        compute()
    assert not fussy.calls
    with use_backend("triton"):
        compute()
        assert fussy.calls == ["forward"]
        with pytest.raises(RuntimeError, match=r"'triton' was requested but cannot.*9 features are not a multiple of 8"):
            lora_linear(torch.ones(2, 9), torch.ones(3, 9), torch.ones(1, 9), torch.ones(3, 1))


@pytest.mark.parametrize("outside", ["auto", "torch"])
def test_backward_runs_where_forward_ran(fussy, outside):
    problem = Case().draw()
    with use_backend("triton"):
        y = lora_linear(*problem.inputs.values())
    with use_backend(outside):
        y.backward(problem.dy)
    assert fussy.calls == ["forward", "backward"]
    with use_backend("torch"):
        y = lora_linear(*problem.inputs.values())
    with use_backend("triton"):
        y.backward(problem.dy)
    assert fussy.calls == ["forward", "backward"]


def test_backward_in_another_thread_runs_where_forward_ran(fussy):
    problem = Case().draw()
    with use_backend("triton"):
        y = lora_linear(*problem.inputs.values())
    thread = threading.Thread(target=y.backward, args=(problem.dy,))
    thread.start()
    thread.join()
    assert fussy.calls == ["forward", "backward"]


def test_backward_of_a_compiled_graph_runs_where_forward_ran(fussy):
    """The setting at the time of a call is a part of its graph; another setting is another graph."""
    torch._dynamo.reset()
    problem = Case().draw()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for setting, calls in (("triton", ["forward", "backward"]), ("torch", []), ("triton", ["forward", "backward"])):
        with use_backend(setting):
            y = compiled(*problem.inputs.values())
        with use_backend("torch"):
            y.backward(problem.dy)
        assert fussy.calls == calls
        fussy.calls.clear()


def test_without_a_wanted_gradient_nothing_is_kept(fussy):
    x = Case(needs=()).draw().inputs
    assert lora_linear(*x.values()).grad_fn is None
    with torch.no_grad():
        assert lora_linear(*Case().draw().inputs.values()).grad_fn is None


@every_kind
def test_every_kind_names_who_computes(kind, device):
    problem = Case(quant_type=kind.quant_type, device=device).draw()
    used = [row.backend for row in backend_report(problem.x, problem.W, problem.A, problem.B) if row.used]
    assert used == [kind.backend]


class WithRotation(NamedTuple):
    """LoRAWeights as it will be with one more field."""

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    bias: torch.Tensor | None = None
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    rotation: torch.Tensor | None = None


@pytest.mark.parametrize("name", ["torch", "cpu", "triton", "cuda"])
def test_a_field_that_a_backend_does_not_know_is_refused(name, cuda, device):
    """Unless it is at its default: nothing new is silently ignored."""
    kind = next(kind for kind in KINDS if kind.backend == name)
    problem = Case(quant_type=kind.quant_type, device=device).draw()
    with use_backend(name):
        for rotation, refused in ((None, False), (torch.ones(33, device=device), True)):
            member = WithRotation(*problem.member(), rotation)
            call = plan.describe("linear", name, problem.x.dtype, problem.x, (member,), None, ())
            assert call.fields >= {"weight", "lora_A", "lora_B", "bias", "scaling"}
            if refused:
                with pytest.raises(RuntimeError, match="it does not know rotation"):
                    plan.choose(call)
            else:
                assert plan.choose(call).backend == name


def test_calls_are_hashable_and_equal_for_equal_layouts():
    """A cache of plans needs no more."""
    one, other = (Case().draw() for _ in range(2))
    calls = [
        plan.describe("linear", "auto", p.x.dtype, p.x, (p.member(),), p.dropout(), ())._replace(x=plan.layout(one.x))
        for p in (one, one)
    ]
    assert len({hash(call) for call in calls}) == 1
    assert calls[0] == calls[1]
    longer = plan.describe("linear", "auto", other.x.dtype, other.x[:3], (one.member(),), None, ())
    assert longer != calls[0]


@pytest.mark.parametrize("backend", ["triton", "cpu", "torch"])
def test_several_members_are_of_the_backend_that_is_asked_for(backend, device):
    problem = Case(device=device).draw()
    call = plan.describe("linear", backend, problem.x.dtype, problem.x, (problem.member(),) * 2, None, ())
    assert plan.choose(call).backend == backend


def test_an_operation_that_a_backend_lacks_is_a_stated_refusal():
    assert plan.load("cuda", "nothing") in ("it has no 'nothing'",) or "extension" in plan.load("cuda", "nothing")
    assert plan.load("torch", "nothing") == "it has no 'nothing'"


def test_setting_is_restored_and_seen_by_other_threads():
    assert use_backend.current == "auto"
    with use_backend("torch"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(use_backend.current))
        thread.start()
        thread.join()
        assert seen == ["torch"]
        with use_backend("auto"):
            assert use_backend.current == "auto"
        assert use_backend.current == "torch"
    assert use_backend.current == "auto"
    try:
        use_backend("torch")
        assert use_backend.current == "torch"
    finally:
        use_backend("auto")


def test_unknown_and_missing_backends(monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'tirton', expected 'auto', 'cuda', 'triton', 'cpu', 'torch'"):
        use_backend("tirton")

    def missing(operation):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setitem(plan.BACKENDS, "cuda", missing)
    plan.load.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the package 'triton' is not installed"):
        use_backend("cuda")
    plan.load.cache_clear()
    assert use_backend.current == "auto"


def test_report(fussy):
    rows = {row.backend: row for row in backend_report(x=torch.ones(2, 9))}
    assert rows["cpu"].used or rows["torch"].used  # by what was built
    assert "not a multiple of 8" in rows["triton"].reason
    assert not rows["triton"].usable
    report = backend_report(x=torch.ones(2, 8), weight=torch.ones(3, 8))
    assert [row.backend for row in report if row.used] == ["triton"]
    with use_backend("torch"):
        assert [row.backend for row in backend_report(x=torch.ones(2, 8)) if row.used] == ["torch"]
    assert all(row.backend in str(report) and row.reason in str(report) for row in report)


def python(code, **environment):
    root = os.path.dirname(os.path.dirname(lora_kernels.__file__))
    environment = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_import_touches_neither_triton_nor_a_device():
    code = (
        "import sys, torch; before = set(sys.modules); import lora_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert not torch.cuda.is_initialized(); "
        "print(sorted(new & {'triton', 'transformers', 'peft', 'rich', 'typer', 'matplotlib', 'safetensors'}))"
    )
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_environment_variable():
    code = (
        "import torch; from lora_kernels import lora_linear, use_backend; print(use_backend.current); "
        "lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1))"
    )
    result = python(code, LORA_KERNELS_BACKEND="torch")
    assert (result.returncode, result.stdout.strip()) == (0, "torch")
    result = python(code, LORA_KERNELS_BACKEND="tirton")
    assert "LORA_KERNELS_BACKEND: got 'tirton', expected 'auto'" in result.stderr


def test_public_names_are_there():
    assert all(hasattr(lora_kernels, name) for name in lora_kernels.__all__)
    assert LoRAWeights._fields == ("weight", "lora_A", "lora_B", "bias", "scaling", "magnitude")
