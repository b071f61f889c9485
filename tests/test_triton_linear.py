"""What is Triton's alone: when it is chosen, what happens where kernels do not compile. Its numbers are in test_linear.py."""

import pytest
import torch
from accuracy import Case, check_contract, contract
from kinds import KINDS
from triton_interpreter import DEVICE

from lora_kernels import backend_report, lora_linear, use_backend
from lora_kernels.backends.torch import linear as pytorch
from lora_kernels.backends.triton import compilation, gpu, launch, tuning
from lora_kernels.backends.triton import linear as triton
from lora_kernels.backends.triton.kernels import project
from lora_kernels.backends.triton.planning import plan_of
from lora_kernels.plan import changed, choose, describe

CASE = Case(M=40, K=48, N=56, R=8, p=0.3, dtype=torch.float16, device=DEVICE)


@pytest.fixture
def nothing_rejected_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this test provokes stays in it."""
    monkeypatch.setattr(compilation, "rejected", {})
    monkeypatch.setattr(compilation, "broken", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_the_pytorch_backend(dtype: torch.dtype) -> None:
    """The same equations with the same mask: float32 agrees to rounding, and 16 bits to theirs."""
    problem = Case(M=70, K=600, N=264, R=12, p=0.3, dtype=dtype, adapter_dtype=torch.float32, device=DEVICE).draw()
    found = {}
    for name in ("triton", "torch"):
        with use_backend(name):
            found[name] = contract(problem)
    for name, want in found["torch"].items():
        got = found["triton"][name]
        assert (got.double() - want.double()).norm() <= 4 * torch.finfo(want.dtype).eps * want.double().norm(), name


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about the interpreter")
def test_auto_never_picks_the_interpreter() -> None:
    x = torch.zeros(2, 4)
    row = {row.backend: row for row in backend_report(x)}["triton"]
    assert not row.usable
    assert "use_backend('triton')" in row.reason
    with use_backend("triton"):
        assert {row.backend: row for row in backend_report(x)}["triton"].used


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a CPU tensor is refused only outside the interpreter")
def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "INTERPRETER", False)
    row = {row.backend: row for row in backend_report(torch.zeros(2, 4))}["triton"]
    assert row.reason == "needs CUDA tensors, got cpu"


def test_float64_is_refused_with_a_reason() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    with use_backend("triton"), pytest.raises(RuntimeError, match="x is float64"):
        lora_linear(x, x, x[:1], x[:, :1])


def test_what_the_kernels_have_no_numbers_for_is_refused() -> None:
    problem = CASE.draw()
    call = describe("linear", "triton", torch.float16, problem.x, (problem.member(),), problem.dropout(), ())
    assert choose(call).backend == "triton"
    with pytest.raises(RuntimeError, match="31 bits"):
        choose(call._replace(x=call.x._replace(shape=(1 << 31, 48))))


def test_a_tile_that_does_not_compile_is_replaced_and_reported(
    nothing_rejected_yet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next tile is taken; where none is left, the call goes to PyTorch, or raises if Triton was asked for."""
    problem, (best, *rest) = CASE.draw(), tuning.tiles("project", "16", 8, tuning.gpu(DEVICE).capability)
    refused, right = {best}, launch.first_that_compiles

    def fails(kernel, kind, R, device, run):
        def attempt(tile):
            if tile in refused:
                raise compilation.OutOfResources(300000, 166912, "shared memory")
            return run(tile)

        return right(kernel, kind, R, device, attempt)

    monkeypatch.setattr(launch, "first_that_compiles", fails)
    with use_backend("triton"):
        check_contract(problem)
        assert [key[4] for key in compilation.rejected] == [best]
        assert "shared memory" in triton.notes(problem.x.device)[0]
        assert "shared memory" in str(backend_report(problem.x))
        refused.update(rest)
        changed()
        with pytest.raises(RuntimeError, match="does not compile"):
            lora_linear(*problem.inputs.values())
    assert not compilation.broken  # an explicit request gives nothing up
    _gives_up(problem)
    assert "does not compile" in next(iter(compilation.broken.values()))


def _gives_up(problem) -> None:
    """Under "auto" the same call is PyTorch's, and right."""
    plan = plan_of("triton", _call(problem), (triton.forward, triton.backward), (pytorch.forward, pytorch.backward))
    arguments = problem.x, (problem.member(),), problem.dropout()
    with torch.no_grad():
        (y,), (h,) = plan.forward(*arguments)
        (want,), (want_h,) = pytorch.forward(*arguments)
    assert torch.equal(y, want)
    assert torch.equal(h, want_h)


def _call(problem):
    return describe("linear", "auto", problem.x.dtype, problem.x, (problem.member(),), problem.dropout(), ())


def test_without_a_c_compiler_pytorch_computes(nothing_rejected_yet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its launchers with one; an error of another kind is not hidden."""
    problem = CASE.draw()

    def fails(message: str) -> None:
        def new_parts(*_: object, **__: object) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(project, "new_parts", new_parts)

    fails("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory"):
        _gives_up(problem)
    fails("Failed to find C compiler. Please specify via CC environment variable.")
    _gives_up(problem)
    with use_backend("triton"), pytest.raises(RuntimeError, match="C compiler"):
        lora_linear(*problem.inputs.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.backend in ("triton", "cuda")], ids=str, indirect=True)
def test_with_every_launch_failing_no_kind_of_these_passes(kind, nothing_rejected_yet, monkeypatch) -> None:
    """A test that names a backend tests it: nothing else may compute in its place."""

    def fails(*_: object, **__: object) -> None:
        raise compilation.OutOfResources(300000, 166912, "shared memory")

    for kernel in ("project", "prefill", "grad_dy", "grad_x"):
        monkeypatch.setattr(triton, kernel, fails)
    monkeypatch.setattr("lora_kernels.backends.triton.kernels.nf4_product.product", fails)
    with pytest.raises(compilation.OutOfResources):
        contract(Case(M=40, K=64, quant_type=kind.quant_type, dtype=torch.float16, device=DEVICE).draw())
