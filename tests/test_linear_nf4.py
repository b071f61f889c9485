"""lora_linear over a 4-bit weight: its formats, what is saved and allocated, CPUs with and without 16-bit instructions."""

import threading
from dataclasses import replace

import pytest
import torch
from accuracy import Case, check, check_checkpoint, ours, plain, truth, violations
from kinds import DTYPES, KINDS

from lora_kernels import backend_report, cpu_extension, lora_linear, quantize_nf4, use_backend
from lora_kernels.backends.torch import linear as pytorch
from lora_kernels.backends.torch import nf4 as codec
from lora_kernels.commands.measure import peak_bytes
from lora_kernels.nf4.weight import BLOCKSIZES

OVER_4_BITS = tuple(kind for kind in KINDS if kind.quant_type)
every_4_bit_kind = pytest.mark.parametrize("kind", OVER_4_BITS, ids=str, indirect=True)


@every_4_bit_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocksizes(kind, blocksize, double_quant, dtype, device):
    for quant_type, K in (("nf4", 4096 if kind.backend in ("torch", "cpu") else 96), ("fp4", 100)):
        case = Case(M=8, K=K, N=40, p=0.1, dtype=dtype, device=device, quant_type=quant_type, blocksize=blocksize)
        case.double_quant = double_quant
        check(case)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(kind, dtype) for kind in OVER_4_BITS for dtype in kind.dtypes], ids=str, indirect=["kind"]
)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32])
def test_x_of_another_dtype_than_the_quantised_weight(kind, base, dtype, device):
    check(Case(M=65, K=130, N=67, p=0.1, dtype=dtype, device=device, quant_type="nf4", base_dtype=base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("K", "N"), [(4096, 3), (96, 5000), (1056, 1100)])
def test_several_tiles(K, N, dtype, device):
    with use_backend("torch"):
        check(Case(M=33, K=K, N=N, R=3, p=0.25, dtype=dtype, device=device, quant_type="nf4", blocksize=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("K", "N"), [(1024, 132), (132, 1028)])
def test_cpus_with_and_without_16_bit_instructions(K, N, native, dtype, monkeypatch):
    """Several tiles of rows and columns, and several chunks of rows of x."""
    monkeypatch.setattr("lora_kernels.backends.products.cpu_multiplies", lambda _: native)
    monkeypatch.setattr("lora_kernels.backends.torch.engine.WIDE_ELEMENTS", 1 << 10)
    monkeypatch.setattr("lora_kernels.backends.torch.nf4.TILE", 1 << 16)
    with use_backend("torch"):
        check(Case(M=300, K=K, N=N, R=4, p=0.1, dtype=dtype, adapter_dtype=torch.float32, quant_type="nf4"))


@every_4_bit_kind
def test_forward_and_backward_read_the_same_weight(kind, device):
    """dy·W with dy a unit matrix, and x·Wᵀ with x one: the dequantised weight itself, bit for bit, for every dtype."""
    for dtype in kind.dtypes:
        w = quantize_nf4(torch.randn(96, 128, device=device))
        A, B = torch.zeros(1, 128, device=device), torch.zeros(96, 1, device=device)
        expected = w.dequantize(dtype)
        x = torch.eye(128, dtype=dtype, device=device)
        assert torch.equal(lora_linear(x, w, A, B).T, expected)
        x = torch.zeros(96, 128, dtype=dtype, device=device, requires_grad=True)
        lora_linear(x, w, A, B).backward(torch.eye(96, dtype=dtype, device=device))
        assert torch.equal(x.grad, expected)


@every_4_bit_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(kind, use_reentrant, device):
    check_checkpoint(Case(p=0.4, device=device, quant_type="nf4").draw(), use_reentrant)


# ---- what is saved and allocated ----


@every_4_bit_kind
@pytest.mark.parametrize("M", [7, 64])
def test_saved_tensors(kind, M, device):
    """x, the parameters, the 4-bit weight's own tensors, h and the seed: nothing of the weight's dense size."""
    K, N, R = 256, 192, 8
    problem = Case(M=M, K=K, N=N, R=R, dtype=torch.bfloat16, device=device, quant_type="nf4").draw()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(*problem.inputs.values(), dropout_p=0.1)
    known = [problem.x, problem.A, problem.B, problem.c, *problem.W.tensors().values()]
    pointers = {t.data_ptr() for t in known}
    extra = [t for t in saved if t.data_ptr() not in pointers]
    assert sorted(t.nbytes for t in extra) == [8, 2 * M * R]
    y.sum().backward()


def test_frozen_x_saves_nothing_of_the_weight(device):
    problem = Case(needs=("A", "B"), device=device, quant_type="nf4").draw()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(*problem.inputs.values())
    assert not {t.data_ptr() for t in saved} & {t.data_ptr() for t in problem.W.tensors().values()}


@pytest.mark.parametrize(
    ("M", "dtype", "native"),
    [(16, torch.bfloat16, True), (16, torch.float32, True), (128, torch.bfloat16, True), (512, torch.bfloat16, False)],
)
def test_peak_memory(M, dtype, native, monkeypatch):
    """Forward and backward of 2048 -> 8192: at most 16 MiB beside their results; the dense weight would be 32 or 64."""
    monkeypatch.setattr("lora_kernels.backends.products.cpu_multiplies", lambda d: native or d == torch.float32)
    K, N, R = 2048, 8192, 16
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
    assert (2 << 20 if M > 16 else 0) < peaks[0] <= outputs[0].nbytes + limit  # a tile alone takes 2 or 4 MiB
    assert 2 << 20 < peaks[1] <= sum(t.nbytes for t in outputs[1]) + limit


def peak_in_a_new_thread(fn):
    """There the memory that a thread keeps for its next call is counted as well."""
    peaks = []
    thread = threading.Thread(target=lambda: peaks.append(peak_bytes(fn)))
    thread.start()
    thread.join()
    return peaks[0]


# ---- reports and errors ----


def test_backends_say_whether_they_read_4_bits(device):
    problem = Case(device=device, quant_type="nf4").draw()
    rows = {row.backend: row for row in backend_report(problem.x, problem.W)}
    assert rows["torch"].usable
    for name in ("cpu", "triton", "cuda"):
        assert rows[name].usable or rows[name].reason


def test_errors(device):
    x, w, A, B, c = Case(K=64, device=device, quant_type="nf4").draw().inputs.values()
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


@every_4_bit_kind
@pytest.mark.parametrize("M", [8, 20])
@pytest.mark.parametrize("mutant", ["swapped nibbles", "neighbour's absmax", "another offset"])
def test_a_wrongly_read_weight_is_caught(kind, mutant, M, device):
    problem = Case(M=M, K=128, N=40, R=8, quant_type="nf4", dtype=torch.bfloat16, device=device).draw()
    right = problem.W
    expected, exact = plain(problem), truth(problem)
    assert not violations(ours(problem), expected, exact, torch.bfloat16)
    wrong = {
        "swapped nibbles": right.with_tensors(codes=right.codes << 4 | right.codes >> 4),
        "neighbour's absmax": right.with_tensors(absmax=right.absmax.roll(1)),
        "another offset": right.with_tensors(nested_offset=right.nested_offset * 1.02),
    }[mutant]
    broken = violations(ours(replace(problem, W=wrong)), expected, exact, torch.bfloat16)
    assert {line.partition(":")[0] for line in broken} >= {"y", "dx"}


def test_swapped_nibbles_of_the_table_are_caught(monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", None)  # which has mutants of its own
    table = codec.pair_table("nf4", torch.device("cpu"))
    swapped = table.view(torch.float32).view(-1, 2).flip(1).contiguous().view(torch.int64).flatten()
    problem = Case(K=64, quant_type="nf4", blocksize=32).draw()
    expected, exact = plain(problem), truth(problem)
    monkeypatch.setattr(codec, "pair_table", lambda *_: swapped)
    with use_backend("torch"):
        assert violations(ours(problem), expected, exact, torch.float32)


def test_a_backward_pass_by_another_weight_is_caught(monkeypatch):
    problem = Case(K=128, dtype=torch.bfloat16, quant_type="nf4").draw()
    worse, original = quantize_nf4(problem.W.dequantize().mul(0.98)), pytorch.add_backward_product
    monkeypatch.setattr(pytorch, "add_backward_product", lambda dx, dy, W: original(dx, dy, worse))
    with use_backend("torch"):
        assert violations(ours(problem), plain(problem), truth(problem), torch.bfloat16)
