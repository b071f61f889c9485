"""lora_linear over a 4-bit weight: against float64 with the exactly dequantised weight; what it saves and allocates."""

import itertools

import pytest
import torch
from accuracy import Case, check_checkpoint, check_compiled, ours, pytorch, truth, violations
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from lora_kernels import backend_report, lora_linear, quantize_nf4, use_backend
from lora_kernels.commands.measure import peak_bytes
from lora_kernels.nf4.weight import BLOCKSIZES, quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BASES = [torch.bfloat16, torch.float32]


def draw(case, base=torch.bfloat16, quant_type="nf4", blocksize=64, double_quant=True):
    """The case's tensors with a 4-bit W, and the same with the dense W that the layer reads."""
    tensors = case.tensors()
    w = quantize(tensors["W"].detach().to(base), quant_type, blocksize, double_quant)
    read = case.autocast or case.dtype
    return {**tensors, "W": w}, {**tensors, "W": w.dequantize(read).to(case.dtype)}


def check(case, **kind):
    tensors, dense = draw(case, **kind)
    before = {name: t.clone() for name, t in tensors["W"].tensors().items()}
    tested, plain, exact = ours(case, tensors), pytorch(case, dense), truth(case, dense)
    assert {name: t.dtype for name, t in tested.items()} == {name: t.dtype for name, t in plain.items()}
    broken = violations(tested, plain, exact, case.autocast or case.dtype)
    assert not broken, f"{case}: {broken}"
    assert all(torch.equal(t, before[name]) for name, t in tensors["W"].tensors().items())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gradcheck(p, quant_type):
    case = Case(M=(2, 3), K=9, N=5, R=2, dtype=torch.float64)
    tensors, _ = draw(case, quant_type=quant_type, blocksize=32)

    def compute(x, A, B, c):
        return lora_linear(x, tensors["W"], A, B, c, scaling=0.7, dropout_p=p, seed=3)

    assert torch.autograd.gradcheck(compute, [tensors[name] for name in "xABc"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M", [1, 15, 17, 129])
def test_rows(M, p, dtype, device):
    check(Case(M=M, K=192, N=67, R=8, p=p, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (7, 301), (300, 7), (129, 65), (64, 256), (4096, 3), (96, 5000), (1056, 1100)])
def test_features(K, N, dtype, device):
    check(Case(M=33, K=K, N=N, R=3, p=0.25, dtype=dtype, device=device), blocksize=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes(blocksize, double_quant, dtype, device):
    for quant_type, K in (("nf4", 4096), ("fp4", 100)):
        case = Case(M=5, K=K, N=40, p=0.1, dtype=dtype, device=device)
        check(case, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
def test_x_of_another_dtype_than_the_quantised_weight(base, dtype, device):
    check(Case(M=65, K=130, N=67, p=0.1, dtype=dtype, device=device), base=base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.float64])
def test_wider_adapters(adapter_dtype, dtype, device):
    check(Case(M=129, K=128, N=67, R=8, p=0.1, dtype=dtype, adapter_dtype=adapter_dtype, device=device))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (3, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides(shape, strided, device):
    check(Case(M=shape, p=0.2, dtype=torch.bfloat16, strided=strided, device=device))


@pytest.mark.parametrize("needs", [n for k in range(5) for n in itertools.combinations(("x", "A", "B", "c"), k)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_combination_of_gradients(needs, p, device):
    check(Case(p=p, needs=needs, device=device))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_autocast(p, narrow, device):
    check(Case(M=65, K=64, N=45, p=p, autocast=narrow, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("K", "N"), [(4096, 520), (520, 4100), (1000, 1100)])
def test_cpus_with_and_without_16_bit_instructions(K, N, native, dtype, monkeypatch):
    """Several tiles of rows and columns, and several chunks of rows of x."""
    monkeypatch.setattr("lora_kernels.backends.torch.linear.cpu_multiplies", lambda _: native)
    monkeypatch.setattr("lora_kernels.backends.torch.linear.WIDE_ELEMENTS", 1 << 10)
    check(Case(M=300, K=K, N=N, R=4, p=0.1, dtype=dtype, adapter_dtype=torch.float32))


@settings(max_examples=80, deadline=None)
@given(
    case=st.builds(
        Case,
        M=st.integers(0, 70),
        K=st.integers(1, 200),
        N=st.integers(1, 90),
        R=st.integers(1, 40),
        p=st.sampled_from([0.0, 0.05, 0.5, 0.97]),
        scaling=st.floats(-4, 4, allow_subnormal=False),
        bias=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        needs=st.sets(st.sampled_from("xABc"), min_size=1).map(tuple),
        strided=st.booleans(),
    ),
    base=st.sampled_from(BASES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
)
def test_random_options(device, case, **kind):
    case.device = device
    check(case, **kind)


def test_forward_and_backward_read_the_same_weight(device):
    """dy·W with dy a unit matrix, and x·Wᵀ with x one: the dequantised weight itself, bit for bit, for every dtype."""
    for dtype in DTYPES:
        w = quantize_nf4(torch.randn(96, 128, device=device))
        A, B = torch.zeros(1, 128, device=device), torch.zeros(96, 1, device=device)
        expected = w.dequantize(dtype)
        x = torch.eye(128, dtype=dtype, device=device)
        assert torch.equal(lora_linear(x, w, A, B).T, expected)
        x = torch.zeros(96, 128, dtype=dtype, device=device, requires_grad=True)
        lora_linear(x, w, A, B).backward(torch.eye(96, dtype=dtype, device=device))
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant, device):
    check_checkpoint(draw(Case(p=0.4, device=device))[0], use_reentrant)


# ---- what is saved and allocated ----


def test_saved_tensors(device):
    """x, the parameters, the 4-bit weight's own tensors, h and the seed: nothing of the weight's dense size."""
    M, K, N, R = 64, 256, 192, 8
    tensors, _ = draw(Case(M=M, K=K, N=N, R=R, dtype=torch.bfloat16, device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(*(tensors[name] for name in "xWABc"), dropout_p=0.1)
    known = [*(tensors[name] for name in "xABc"), *tensors["W"].tensors().values()]
    pointers = {t.data_ptr() for t in known}
    extra = [t for t in saved if t.data_ptr() not in pointers]
    assert sorted(t.nbytes for t in extra) == [8, 2 * M * R]
    y.sum().backward()


def test_frozen_x_saves_nothing_of_the_weight(device):
    tensors, _ = draw(Case(needs=("A", "B"), device=device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(*(tensors[name] for name in "xWABc"))
    assert not {t.data_ptr() for t in saved} & {t.data_ptr() for t in tensors["W"].tensors().values()}


@pytest.mark.parametrize(
    ("M", "dtype", "native"),
    [(16, torch.bfloat16, True), (16, torch.float32, True), (512, torch.bfloat16, True), (512, torch.bfloat16, False)],
)
def test_peak_memory(M, dtype, native, monkeypatch):
    """Forward and backward of 4096 -> 14336: at most 16 MiB beside their results; the dense weight would be 112 or 224."""
    monkeypatch.setattr("lora_kernels.backends.torch.linear.cpu_multiplies", lambda d: native or d == torch.float32)
    K, N, R = 4096, 14336, 16
    w = quantize_nf4(torch.randn(N, K, dtype=torch.bfloat16))
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    A, B = torch.randn(R, K, requires_grad=True), torch.randn(N, R, requires_grad=True)
    dy, outputs = torch.randn(M, N, dtype=dtype), []

    def forward():
        outputs.append(lora_linear(x, w, A, B, dropout_p=0.1, seed=1))

    def backward():
        outputs.append(torch.autograd.grad(outputs[0], (x, A, B), dy))

    limit = 16 << 20
    peaks = peak_in_a_new_thread(forward), peak_in_a_new_thread(backward)
    assert 2 << 20 < peaks[0] <= outputs[0].nbytes + limit  # a tile alone takes 2 or 4 MiB
    assert 2 << 20 < peaks[1] <= sum(t.nbytes for t in outputs[1]) + limit


def peak_in_a_new_thread(fn):
    """There the memory that a thread keeps for its next call is counted as well."""
    import threading

    peaks = []
    thread = threading.Thread(target=lambda: peaks.append(peak_bytes(fn)))
    thread.start()
    thread.join()
    return peaks[0]


# ---- operators, compile, backends, errors ----


def operator_arguments(tensors):
    return tensors["x"], *tensors["W"].fields(), tensors["A"], tensors["B"], tensors["c"]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_opcheck_forward(p, double_quant, device):
    tensors, _ = draw(Case(M=(2, 3), dtype=torch.bfloat16, device=device), double_quant=double_quant)
    scaling, seed = torch.tensor(0.5, device=device), torch.tensor(7, device=device) if p else None
    arguments = (*operator_arguments(tensors), scaling, p, seed, torch.bfloat16)
    opcheck(torch.ops.lora_kernels.lora_forward_nf4, arguments)


@pytest.mark.parametrize("needs", [(True, True, True, True), (True, False, False, False)])
def test_opcheck_backward(needs, device):
    tensors, _ = draw(Case(M=6, dtype=torch.bfloat16, device=device, needs=()))
    h = torch.randn(6, tensors["A"].shape[0], device=device).bfloat16()
    weight, scaling, seed = tensors["W"].fields(), torch.tensor(0.5, device=device), torch.tensor(7, device=device)
    rest = (tensors["A"], tensors["B"], h, scaling, 0.3, seed, list(needs))
    opcheck(torch.ops.lora_kernels.lora_backward_nf4, (tensors["dy"], tensors["x"], *weight, *rest))


@pytest.mark.parametrize("double_quant", [False, True])
def test_compiled_equals_eager(double_quant, device):
    case = Case(p=0.3, dtype=torch.bfloat16, device=device, scaling=0.5)
    check_compiled(case, lambda case: draw(case, double_quant=double_quant)[0])


def test_backends_say_whether_they_read_4_bits(device):
    tensors, _ = draw(Case(device=device))
    rows = {row.backend: row for row in backend_report(tensors["x"].flatten(0, -2), tensors["W"])}
    assert rows["torch"].usable
    for name in ("triton", "cuda"):
        assert rows[name].usable or rows[name].reason
    with use_backend("torch"):
        check(Case(device=device))


def test_errors(device):
    tensors, _ = draw(Case(K=64, device=device))
    x, w, A, B, c = (tensors[name] for name in "xWABc")
    with pytest.raises(ValueError, match=r"x: got shape \(17, 63\)"):
        lora_linear(x[:, 1:], w, A, B, c)
    with pytest.raises(ValueError, match="weight: got an NF4Weight on meta"):
        lora_linear(x, w.to("meta"), A, B, c)
    with pytest.raises(ValueError, match=r"absmax: got .* is the state truncated"):
        lora_linear(x, w.with_tensors(absmax=w.absmax[1:]), A, B, c)
    flat = quantize_nf4(torch.randn(64, device=device))
    with pytest.raises(ValueError, match=r"weight: got shape \(64,\)"):
        lora_linear(x, flat, A, B, c)
    y = lora_linear(x, w, A, B, c)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


# ---- the tests notice ----


@pytest.mark.parametrize("mutant", ["swapped nibbles", "neighbour's absmax", "backward by another weight"])
def test_mutants_are_caught(mutant, monkeypatch):
    from lora_kernels import cpu_extension
    from lora_kernels.backends.torch import linear as reference
    from lora_kernels.nf4 import codec as nf4_codec

    if mutant == "swapped nibbles":
        monkeypatch.setattr(cpu_extension, "extension", None)  # which has mutants of its own
        table = nf4_codec.pair_table("nf4", torch.device("cpu"))
        swapped = table.view(torch.float32).view(-1, 2).flip(1).contiguous().view(torch.int64).flatten()
        case, kind = Case(K=64), {"blocksize": 32}
        tensors, dense = draw(case, **kind)
        monkeypatch.setattr(nf4_codec, "pair_table", lambda *_: swapped)
        tested = ours(case, tensors)
    elif mutant == "neighbour's absmax":
        case = Case(K=128)
        tensors, dense = draw(case)
        w = tensors["W"]
        tested = ours(case, {**tensors, "W": w.with_tensors(absmax=w.absmax.roll(1))})
    else:
        case = Case(K=128, dtype=torch.bfloat16)
        tensors, dense = draw(case)
        original = reference.add_backward_product
        worse = quantize_nf4(dense["W"].mul(0.98))
        monkeypatch.setattr(reference, "add_backward_product", lambda dx, dy, W: original(dx, dy, worse))
        tested = ours(case, tensors)
    assert violations(tested, pytorch(case, dense), truth(case, dense), case.dtype)
