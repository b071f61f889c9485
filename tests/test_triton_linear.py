"""The Triton backend against float64, at every dtype, shape, layout and set of wanted gradients."""

import itertools

import pytest
import torch
from triton_case import ALL, BF16, DTYPES, FP16, FP32, SEED, Case, S, backend
from triton_interpreter import DEVICE

from lora_kernels import backend_report, lora_linear, use_backend
from lora_kernels.backends.torch import linear as reference
from lora_kernels.backends.torch.linear import Needs
from lora_kernels.backends.triton import forward, tuning


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES)
def test_every_dtype(dtype: torch.dtype, adapter: torch.dtype, p: float) -> None:
    case = Case.draw(70, 600, 264, 12, dtype, adapter, p)
    case.check(case.run())


@pytest.mark.parametrize("M", [1, 15, 17, 129])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 33), (65, 3), (530, 129)])
def test_ragged_sizes(M: int, K: int, N: int) -> None:
    case = Case.draw(M, K, N, 4, BF16, BF16)
    case.check(case.run())


@pytest.mark.parametrize("adapter", [BF16, FP32])
@pytest.mark.parametrize("R", [1, 4, 8, 12, 16, 24, 64, 65, 128])
def test_every_rank(R: int, adapter: torch.dtype) -> None:
    case = Case.draw(33, 72, 80, R, BF16, adapter)
    case.check(case.run())


@pytest.mark.parametrize("R", [8, 80])
@pytest.mark.parametrize("needs", [Needs(*n) for n in itertools.product([False, True], repeat=4)])
def test_only_the_wanted_gradients(needs: Needs, R: int) -> None:
    case = Case.draw(40, 48, 56, R)
    case.check(case.run(needs=needs))


@pytest.mark.parametrize("M", [0, 3])
@pytest.mark.parametrize("R", [8, 80])
def test_empty_batch_and_full_dropout(M: int, R: int) -> None:
    case = Case.draw(M, 24, 40, R, p=1.0)
    for name, tensor in case.run().items():
        assert torch.isfinite(tensor).all(), name
    assert not case.run()["dA"].any()
    assert not case.run()["h"].any()


@pytest.mark.parametrize("R", [8, 80])
def test_views(R: int) -> None:
    """Row-strided, transposed, shifted and expanded inputs give what their contiguous copies give."""
    case = Case.draw(40, 48, 56, R)
    want = case.run()
    case.A, case.B = case.A.T.contiguous().T, case.B.T.contiguous().T
    case.dy, case.c = torch.cat([case.dy, case.dy], 1)[:, 56:], torch.stack([case.c, case.c], 1)[:, 0]
    x = case.x
    for case.x in (x.T.contiguous().T, torch.cat([x, x, x], 1)[:, 48:96], torch.stack([x, x], 1)[:, 1]):
        got = case.run()
        assert all(torch.equal(got[name], want[name]) for name in want)
        case.A, case.B = torch.cat([case.A, case.A], 1)[:, 48:], torch.cat([case.B, case.B], 1)[:, R:]


@pytest.mark.parametrize("shape", [(1, 1), (1, 56)])
def test_expanded_dy(shape: tuple[int, int]) -> None:
    case = Case.draw(40, 48, 56, 8)
    case.dy = case.dy[: shape[0], : shape[1]].expand(40, 56)
    got = case.run()
    case.dy = case.dy.contiguous()
    assert all(torch.equal(tensor, got[name]) for name, tensor in case.run().items())
    case.check(got)


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64])
def test_scaling_in_a_tensor(dtype: torch.dtype) -> None:
    case, s = Case.draw(40, 48, 56, 8), torch.tensor(0.75, dtype=dtype, device=DEVICE)
    want = case.run(0.75)
    assert all(torch.equal(tensor, want[name]) for name, tensor in case.run(s).items())


@pytest.mark.parametrize("adapter", [FP16, FP32])
def test_reruns_are_bit_identical(adapter: torch.dtype) -> None:
    case = Case.draw(129, 600, 264, 12, FP16, adapter)
    first = case.run()
    assert all(torch.equal(tensor, first[name]) for name, tensor in case.run().items())


def test_inputs_are_not_written() -> None:
    case = Case.draw(40, 48, 56, 8)
    before = {name: t.clone() for name, t in vars(case).items() if isinstance(t, torch.Tensor)}
    case.run()
    assert all(torch.equal(tensor, vars(case)[name]) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_as_the_pytorch_backend(dtype: torch.dtype) -> None:
    """The same equations with the same mask: float32 agrees to rounding, and 16 bits to theirs."""
    case = Case.draw(70, 600, 264, 12, dtype, FP32)
    y, h = reference.lora_forward(case.x, case.W, case.A, case.B, S, case.c, case.p, case.seed)
    grads = reference.lora_backward(case.dy, case.x, case.W, case.A, case.B, h, S, case.p, case.seed, ALL)
    for (name, got), want in zip(case.run().items(), (y, h, *grads), strict=True):
        assert (got.double() - want.double()).norm() <= 4 * torch.finfo(want.dtype).eps * want.double().norm(), name


def test_autograd_runs_on_it_when_asked() -> None:
    case = Case.draw(40, 48, 56, 8, FP32, FP32)
    leaves = [t.requires_grad_() for t in (case.x, case.A, case.B, case.c)]
    x, A, B, c = leaves
    with use_backend("triton"):
        y = lora_linear(x.view(4, 10, 48), case.W, A, B, c, scaling=S, dropout_p=case.p, seed=SEED)
        y.backward(case.dy.view(4, 10, 56))
    found = dict(zip(("dx", "dA", "dB", "dc"), (leaf.grad for leaf in leaves), strict=True))
    case.check({"y": y.flatten(0, 1), **found})


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
    monkeypatch.setattr(backend, "INTERPRETER", False)
    assert backend.why_not(torch.zeros(2, 4), None, None, None) == "needs CUDA tensors, got cpu"


def test_float64_is_refused_with_a_reason() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)
    with use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        lora_linear(x, x, x[:1], x[:, :1])


def test_a_tile_that_does_not_compile_is_replaced_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next tile is taken; where none is left, the call goes to PyTorch, or raises if Triton was asked for."""
    case, (best, *rest) = Case.draw(40, 48, 56, 8), tuning.tiles("project", "16", 8)
    monkeypatch.setattr(tuning, "rejected", {})
    monkeypatch.setattr(tuning, "broken", {})
    refused = {best}
    launch = tuning.first_that_compiles

    def fails(kernel, kind, R, device, run):
        def attempt(tile):
            if kernel == "project" and tile in refused:
                raise tuning.OutOfResources(300000, 166912, "shared memory")
            return run(tile)

        return launch(kernel, kind, R, device, attempt)

    monkeypatch.setattr(tuning, "first_that_compiles", fails)
    case.check(case.run())
    assert [key[4] for key in tuning.rejected] == [best]
    assert "shared memory" in backend.notes(case.x)[0]
    with use_backend("triton"):
        assert "shared memory" in str(backend_report(case.x))
    refused.update(rest)
    case.check(case.run())
    with use_backend("triton"), pytest.raises(RuntimeError, match="does not compile"):
        lora_linear(case.x, case.W, case.A, case.B)


def test_without_a_c_compiler_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its launchers with one; an error of another kind is not hidden."""
    case = Case.draw(40, 48, 56, 8)
    monkeypatch.setattr(tuning, "rejected", {})
    monkeypatch.setattr(tuning, "broken", {})

    def fails(message: str) -> None:
        def new_parts(*_: object) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(forward, "new_parts", new_parts)

    fails("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory"):
        case.run()
    fails("Failed to find C compiler. Please specify via CC environment variable.")
    case.check(case.run())
    with use_backend("triton"), pytest.raises(RuntimeError, match="C compiler"):
        lora_linear(case.x, case.W, case.A, case.B)
