"""lora_linear against float64 under every option, what it saves, what it computes, and its errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import Case, check, check_checkpoint, ours, pytorch, truth, violations
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import dropout_mask, lora_linear, use_backend
from lora_kernels.backends.torch.linear import Needs
from lora_kernels.plan import load

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(p, bias):
    case = Case(M=(2, 3), K=9, N=5, R=2, p=p, bias=bias, dtype=torch.float64, needs=("x", "W", "A", "B", "c"))
    tensors = case.tensors()
    inputs = [tensors[name] for name in ("x", "W", "A", "B", *(["c"] if bias else []))]

    def compute(x, W, A, B, c=None):
        return lora_linear(x, W, A, B, c, scaling=0.7, dropout_p=p, seed=3)

    assert torch.autograd.gradcheck(compute, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [1, 15, 17, 127, 129])
def test_rows(M, p, dtype, device):
    check(Case(M=M, K=130, N=67, R=8, p=p, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 300), (300, 7), (129, 65), (64, 256)])
def test_features(K, N, dtype, device):
    check(Case(M=33, K=K, N=N, R=3, p=0.25, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", [1, 4, 8, 12, 16, 24, 64, 256])
def test_ranks(R, dtype, device):
    check(Case(M=37, K=70, N=53, R=R, p=0.1, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides(shape, strided, dtype, device):
    check(Case(M=shape, p=0.2, dtype=dtype, strided=strided, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype, device):
    check(Case(M=(3, 0), p=0.2, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64])
def test_wider_adapters(adapter_dtype, p, dtype, device):
    check(Case(M=129, K=130, N=67, R=8, p=p, dtype=dtype, adapter_dtype=adapter_dtype, device=device))


def test_narrower_adapters(device):
    check(Case(M=65, K=130, N=67, R=8, p=0.1, adapter_dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("needs", [n for k in range(6) for n in itertools.combinations(("x", "W", "A", "B", "c"), k)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_combination_of_gradients(needs, p, device):
    check(Case(p=p, needs=needs, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weight_in_16_bit(dtype, device):
    check(Case(M=65, K=66, N=67, p=0.3, needs=("x", "W", "A"), dtype=dtype, device=device))


@pytest.mark.parametrize("scaling", [0, 1, 0.125, -3.0, torch.tensor(1.7), torch.tensor(0.3, dtype=torch.float64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaling(scaling, dtype, device):
    check(Case(p=0.1, scaling=scaling, dtype=dtype, device=device))
    if isinstance(scaling, torch.Tensor):
        check(Case(p=0.1, scaling=scaling.to(device), dtype=dtype, device=device))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_autocast(p, base, narrow, device):
    """fp32 x and adapters; the output and the base product have autocast's dtype, gradients their parameter's."""
    case = Case(M=65, K=70, N=45, p=p, autocast=narrow, device=device, needs=("x", "A", "B", "c"))
    tensors = case.tensors()
    tensors["W"] = tensors["W"].to(base)
    tested, plain = ours(case, tensors), pytorch(case, tensors)
    assert tested["y"].dtype == narrow
    assert all(tested[f"d{name}"].dtype == tensors[name].dtype for name in case.needs)
    assert violations(tested, plain, truth(case, tensors), narrow) == []


def test_autocast_leaves_float64_alone(device):
    case = Case(dtype=torch.float64, device=device)
    tensors = case.tensors()
    with torch.autocast(device.type, torch.bfloat16):
        assert lora_linear(*(tensors[name] for name in "xWABc")).dtype == torch.float64


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Case,
        M=st.integers(0, 70),
        K=st.integers(1, 90),
        N=st.integers(1, 90),
        R=st.integers(1, 40),
        p=st.sampled_from([0.0, 0.05, 0.5, 0.9]),
        scaling=st.floats(-4, 4, allow_subnormal=False),
        bias=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        needs=st.sets(st.sampled_from("xWABc"), min_size=1).map(tuple),
        seed=st.integers(-(2**63), 2**63 - 1),
        strided=st.booleans(),
    )
)
def test_random_options(device, case):
    case.device = device
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_without_16_bit_instructions(dtype, monkeypatch):
    """There the base products run through float32, in several tiles."""
    monkeypatch.setattr("lora_kernels.backends.torch.linear.cpu_multiplies", lambda _: False)
    check(Case(M=2100, K=20, N=600, R=4, p=0.1, dtype=dtype, needs=("x", "W", "A", "B", "c")))
    check(Case(M=70, K=600, N=20, R=4, p=0.1, dtype=dtype, adapter_dtype=torch.float32))


def test_several_chunks_of_rows(monkeypatch, device):
    monkeypatch.setattr(
        "lora_kernels.backends.torch.linear.row_chunks",
        lambda M, width, device: [slice(i, min(i + 7, M)) for i in range(0, M, 7)],
    )
    check(Case(M=40, p=0.2, dtype=torch.bfloat16, device=device))


# ---- seeds and masks ----


def inputs(device):
    tensors = Case(device=device, needs=()).tensors()
    return [tensors[name] for name in "xWAB"]


def test_the_generator_decides_the_mask(device):
    tensors, outputs = inputs(device), []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append([lora_linear(*tensors, dropout_p=0.4) for _ in range(2)])
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])


def test_no_dropout_draws_nothing(device):
    x, W, A, B = inputs(device)
    state = torch.get_rng_state()
    lora_linear(x, W, A, B)
    lora_linear(x, W, A, B, dropout_p=0.0, seed=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropping_everything_is_the_base_layer(device):
    case = Case(p=1.0, device=device, dtype=torch.float64)
    tensors = case.tensors()
    outputs = ours(case, tensors)
    x, W, c = (tensors[name] for name in "xWc")
    assert torch.allclose(outputs["y"], F.linear(x, W, c))
    assert not outputs["dA"].any()
    assert not outputs["dB"].any()
    assert torch.allclose(outputs["dx"], tensors["dy"] @ W)


def test_seed_as_tensor_and_int(device):
    x, W, A, B = inputs(device)
    as_int = lora_linear(x, W, A, B, dropout_p=0.4, seed=-9)
    assert torch.equal(as_int, lora_linear(x, W, A, B, dropout_p=0.4, seed=torch.tensor(-9, device=device)))
    assert torch.equal(as_int, lora_linear(x, W, A, B, dropout_p=0.4, seed=torch.tensor([-9], device=device)))
    keep = dropout_mask(17, 24, 0.4, -9, device=device)
    alone = lora_linear(torch.ones_like(x), torch.zeros_like(W), torch.ones_like(A), torch.ones_like(B), dropout_p=0.4, seed=-9)
    assert torch.allclose(alone[:, 0], keep.sum(1) * 4 / (1 - round(0.4 * 65536) / 65536))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, device):
    check_checkpoint(Case(p=0.4, device=device).tensors(), use_reentrant)


def test_runs_are_bit_identical(device):
    case = Case(M=300, K=200, N=150, p=0.2, dtype=torch.bfloat16, device=device)
    tensors = case.tensors()
    first, second = ours(case, tensors), ours(case, tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- what is saved ----


def saved(case, tensors, forward=lora_linear):
    """The tensors that autograd saves, without x and the parameters, and whether x is among them."""
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        forward(*(tensors.get(name) for name in ("x", "W", "A", "B", "c")), dropout_p=case.p)
    inputs = {t.untyped_storage().data_ptr() for t in tensors.values()}
    x = tensors["x"].untyped_storage().data_ptr()
    extra = [t for t in packed if t.untyped_storage().data_ptr() not in inputs]
    return sum(t.untyped_storage().nbytes() for t in extra), any(t.untyped_storage().data_ptr() == x for t in packed)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("strided", [False, True])
def test_saved_bytes(p, strided, device):
    M, R = (4, 32), 8
    case = Case(M=M, K=128, N=96, R=R, p=p, dtype=torch.bfloat16, device=device, strided=strided)
    assert saved(case, case.tensors()) == (2 * 128 * R + (8 if p else 0), True)


def test_saved_bytes_of_a_transposed_x(device):
    case = Case(M=(6, 10), K=128, N=96, R=8, p=0.1, device=device, needs=("A", "B"))
    tensors = case.tensors()
    tensors["x"] = tensors["x"].transpose(0, 1)  # cannot be viewed as [M, K]
    assert saved(case, tensors) == (4 * 60 * 8 + 8, True)


@pytest.mark.parametrize(
    ("needs", "extra", "x_saved"),
    [
        (("x", "B", "c"), 4 * 17 * 4 + 8, False),  # LoRA-FA: frozen A
        (("x", "A"), 8, True),  # frozen B: no h
        (("A", "B"), 4 * 17 * 4 + 8, True),
        (("c",), 0, False),
        (("x",), 8, False),
        ((), 0, False),
    ],
)
def test_only_what_a_wanted_gradient_reads_is_saved(needs, extra, x_saved, device):
    case = Case(p=0.1, needs=needs, device=device)
    assert saved(case, case.tensors()) == (extra, x_saved)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_saved_bytes_with_float32_adapters(p, device):
    """h has the adapters' dtype; x is not copied."""
    case = Case(M=64, K=128, N=96, R=8, p=p, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
    assert saved(case, case.tensors()) == (4 * 64 * 8 + (8 if p else 0), True)


def test_saved_bytes_under_autocast(device):
    case = Case(M=64, K=128, N=96, R=8, p=0.1, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert saved(case, case.tensors()) == (4 * 64 * 8 + 8, True)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_wanted_gradients_are_computed(needs, backend, monkeypatch):
    asked, module = [], load(backend)

    def spy(*args):
        asked.append(args[-1])
        return original(*args)

    original = module.lora_backward
    monkeypatch.setattr(module, "lora_backward", spy)
    names = tuple(name for name, need in zip("xABc", needs, strict=True) if need)
    ours(Case(needs=names), Case(needs=names).tensors())
    assert asked == ([Needs(*needs)] if any(needs) else [])


def test_output_may_be_modified_in_place(device):
    """Nothing that was saved is a view of y, and no input is."""
    case = Case(p=0.2, device=device)
    tensors = case.tensors()
    y = lora_linear(*(tensors[name] for name in "xWABc"), dropout_p=0.2, seed=1)
    y.mul_(2).add_(1)
    y.backward(tensors["dy"])
    expected = Case(p=0.2, device=device, seed=1, scaling=1.0)
    assert torch.allclose(tensors["A"].grad, 2 * ours(expected, tensors)["dA"])


def test_gradients_are_views_of_nothing(device):
    case = Case(device=device)
    tensors = case.tensors()
    outputs = ours(case, tensors)
    storages = [t.untyped_storage().data_ptr() for t in (*outputs.values(), *tensors.values())]
    assert len(set(storages)) == len(storages)


def test_expanded_gradient(device):
    """sum().backward() hands over a gradient of stride zero."""
    tensors = Case(device=device, dtype=torch.float64).tensors()
    x, W, A, B = (tensors[name] for name in "xWAB")
    lora_linear(x, W, A, B).sum().backward()
    assert torch.allclose(x.grad, (W + B @ A).sum(0).expand_as(x))


def test_second_derivative_is_an_error(device):
    tensors = Case(device=device).tensors()
    x = tensors["x"]
    y = lora_linear(*(tensors[name] for name in "xWAB"))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="lora_linear: the second derivative is not implemented"):
        dx.sum().backward()


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": "x"}, TypeError, "x: got str, expected a torch.Tensor"),
        ({"x": torch.ones(3, 5)}, ValueError, r"x: got shape \(3, 5\), expected \[\.\.\., 4\]"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: got dtype torch.int64"),
        (
            {"x": torch.ones(3, 4).double()},
            TypeError,
            r"x: got dtype torch.float64, expected torch.float32 as weight; use x.to",
        ),
        ({"weight": torch.ones(4)}, ValueError, r"weight: got shape \(4,\), expected two dimensions \[N, K\]"),
        ({"lora_A": torch.ones(4, 2)}, ValueError, r"lora_A: got shape \(4, 2\), expected \(4, 4\)"),
        ({"lora_A": torch.ones(0, 4)}, ValueError, "lora_A: got rank 0"),
        ({"lora_B": torch.ones(2, 6)}, ValueError, r"lora_B: got shape \(2, 6\), expected \(6, 2\).*use lora_B.T"),
        ({"lora_B": torch.ones(6, 2).half()}, TypeError, "lora_B: got dtype torch.float16, expected torch.float32 as lora_A"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: got shape \(5,\), expected \(6,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: got dtype torch.float16"),
        ({"weight": torch.ones(6, 4, device="meta")}, ValueError, "weight: got a tensor on meta, expected cpu as x"),
        ({"scaling": "2"}, TypeError, "scaling: got str"),
        ({"scaling": torch.ones(1)}, ValueError, "scaling: got a torch.float32 tensor of shape"),
        ({"scaling": torch.tensor(1.0, requires_grad=True)}, ValueError, "scaling: requires_grad is set"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "dropout_p: got Tensor"),
        ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed: got float"),
    ],
)
def test_errors(changes, error, words):
    arguments = {
        "x": torch.ones(3, 4),
        "weight": torch.ones(6, 4),
        "lora_A": torch.ones(2, 4),
        "lora_B": torch.ones(6, 2),
        **changes,
    }
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        lora_linear(**arguments)
    assert torch.equal(torch.get_rng_state(), state), "a refused call drew a seed"


def test_backend_of_a_call(device):
    with use_backend("torch"):
        check(Case(p=0.1, device=device))
