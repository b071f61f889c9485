"""lora_embedding against float64 under the one rule, mistakes that the rule must catch, its memory, and what it refuses."""

import itertools

import pytest
import torch
from accuracy import run
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.backends.torch import embedding
from lora_kernels.cases.rule import violations
from lora_kernels.functional.embedding import lora_embedding
from lora_kernels.reference import embedding as reference

BF16, FP16, FP32, FP64 = DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SCALING, DRAWS = 0.7, 4
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(BF16, FP32), (FP16, FP32), (FP32, BF16)]


def draw(dtype, adapter, device, M=(3, 50), V=13, N=33, R=4, needs=(True, True, True)):
    """(ids, tensors, dy): some of the V rows are read often, and some never."""
    ids = torch.randint(0, V - 3, M, device=device)
    tensors = {
        "W": torch.randn(V, N, device=device).to(dtype),
        "A": torch.randn(R, V, device=device).to(adapter),
        "B": torch.randn(N, R, device=device).mul(R**-0.5).to(adapter),
    }
    for tensor, need in zip(tensors.values(), needs, strict=True):
        tensor.requires_grad_(need)
    return ids, tensors, torch.randn(*M, N, device=device).to(dtype)


def results(layer, tensors, dy):
    leaves = {name: t for name, t in tensors.items() if t.requires_grad}
    y = layer(*tensors.values())
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)) if leaves else ()
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def judged(dtype, adapter, device, padding_idx=None, **sizes):
    """(tested, PyTorch's, exact) results of one draw."""
    ids, tensors, dy = draw(dtype, adapter, device, **sizes)
    wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}

    def ours(W, A, B):
        return lora_embedding(ids, W, A, B, scaling=SCALING, padding_idx=padding_idx)

    def plain(W, A, B):
        return reference.forward(ids, W, A, B, SCALING, padding_idx)

    calls = (lambda t: results(ours, t, dy), lambda t: results(plain, t, dy), lambda _: results(plain, wide, dy))
    return run(tensors, tensors, *calls)


def broken(dtype, adapter, device, padding_idx=None, **sizes):
    """What breaks the rule over some draws, a line each: the error of few elements is luck."""
    draws = [judged(dtype, adapter, device, padding_idx, **sizes) for _ in range(DRAWS)]
    joined = [{name: torch.cat([own[name].flatten() for own in of]) for name in of[0]} for of in zip(*draws, strict=True)]
    return violations(*joined, dtype if dtype.itemsize < adapter.itemsize else adapter)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize(("dtype", "adapter"), PAIRS, ids=str)
def test_rule(dtype, adapter, padding_idx, device):
    assert not (lines := broken(dtype, adapter, device, padding_idx)), lines


@pytest.mark.parametrize("M", [(), (0,), (1,), (2, 0, 3)])
def test_shapes(M, device):
    for needs in itertools.product((False, True), repeat=3):
        assert not (lines := broken(FP32, FP32, device, M=M, needs=needs)), lines


def test_int32_and_strided_indices_and_a_tensor_scaling(device):
    ids, tensors, _ = draw(FP64, FP64, device)
    expected = lora_embedding(ids, *tensors.values(), scaling=SCALING, padding_idx=-1)
    for other in (ids.int(), ids.T.contiguous().T):
        s = torch.tensor(SCALING, dtype=FP64, device=device)
        torch.testing.assert_close(lora_embedding(other, *tensors.values(), scaling=s, padding_idx=-1), expected)


@pytest.mark.parametrize("padding_idx", [0, 2])
def test_the_row_of_padding_gets_no_gradient(padding_idx, device):
    ids, tensors, dy = draw(FP32, FP32, device)
    found = results(lambda W, A, B: lora_embedding(ids, W, A, B, padding_idx=padding_idx), tensors, dy)
    assert (ids == padding_idx).any()
    assert not found["dA"][:, padding_idx].any()
    assert not found["dW"][padding_idx].any()
    assert found["dA"][:, 3].all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_backward_makes_no_second_tensor_of_a_s_size(dtype, device):
    V, R = 5000, 8
    ids, tensors, dy = draw(FP32, dtype, device, V=V, R=R, N=4, M=(2, 3), needs=(False, True, True))
    y = lora_embedding(ids, *tensors.values())

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() >= V:
                addresses.add(out.untyped_storage().data_ptr())
            return out

    addresses: set[int] = set()
    with Made():
        dA, _ = torch.autograd.grad(y, [tensors["A"], tensors["B"]], dy)
    assert addresses == {dA.data_ptr()}


def test_what_it_saves(device):
    ids, tensors, _ = draw(FP32, FP32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_embedding(ids, *tensors.values())
    own = {t.data_ptr() for t in (*tensors.values(), ids)}
    assert {t.data_ptr() for t in saved} <= own


def test_compiled_as_one_graph(device):
    ids, tensors, dy = draw(FP32, BF16, device)
    layer = lambda W, A, B: lora_embedding(ids, W, A, B, padding_idx=1)  # noqa: E731
    own = results(layer, tensors, dy)
    compiled = results(torch.compile(layer, fullgraph=True, backend="aot_eager"), tensors, dy)
    for name, value in own.items():
        torch.testing.assert_close(compiled[name], value)


def test_no_second_derivative(device):
    ids, tensors, _ = draw(FP32, FP32, device)
    y = lora_embedding(ids, *tensors.values())
    (dA,) = torch.autograd.grad(y.square().sum(), tensors["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dA.sum().backward()


def last_term_alone(original):
    return lambda g, ids, A: A.new_zeros(A.shape).index_copy(1, ids, g.T.to(A.dtype))


def times(number):
    def make(original):
        def backward(*arguments):
            grads = original(*arguments)
            grads[number] = grads[number] * 1.01
            return grads

        return backward

    return make


MUTANTS = {
    **{f"gradient of {name}": ("backward", times(i)) for i, name in enumerate("WAB")},
    "y": ("forward", lambda of: lambda ids, W, A, B, s: of(ids, W, A, B, s * 1.01)),
    "no scaling in backward": ("backward", lambda of: lambda dy, ids, A, B, s, *rest: of(dy, ids, A, B, 1.0, *rest)),
    "padding gets a gradient": (
        "backward",
        lambda of: lambda dy, ids, A, B, s, pad, *rest: of(dy, ids, A, B, s, None, *rest),
    ),
    "a column's last term alone": ("_columns", last_term_alone),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, dtype, device, monkeypatch):
    function, make = MUTANTS[name]
    monkeypatch.setattr(embedding, function, make(getattr(embedding, function)))
    assert broken(dtype, dtype, device, padding_idx=2)


IDS, W, A, B = torch.tensor([1, 2]), torch.ones(5, 4), torch.ones(2, 5), torch.ones(4, 2)
REFUSED = {
    "ids": (
        (IDS.float(), W, A, B),
        TypeError,
        r"ids: got torch.float32, expected .* of int64 or int32; use ids.long\(\)",
    ),
    "weight": ((IDS, W.long(), A, B), TypeError, "weight: got torch.int64"),
    "two": ((IDS, W, A[0], B), ValueError, r"lora_A: got shape \(5,\), expected two dimensions"),
    "A": ((IDS, W, A.T, B), ValueError, r"lora_A: got shape \(5, 2\), expected \(5, 5\)"),
    "B": ((IDS, W, A, B.T), ValueError, r"lora_B: got shape \(2, 4\), expected \(4, 2\)"),
    "rank": ((IDS, W, A[:0], B[:, :0]), ValueError, "R at least 1"),
    "dtypes": ((IDS, W, A, B.double()), TypeError, "lora_B: got dtype torch.float64, expected torch.float32 as lora_A"),
    "index": ((IDS + 4, W, A, B), IndexError, "out of range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        lora_embedding(*arguments)


def test_a_padding_outside_is_refused():
    with pytest.raises(ValueError, match="padding_idx: got 5, expected it within the 5 rows"):
        lora_embedding(IDS, W, A, B, padding_idx=5)
