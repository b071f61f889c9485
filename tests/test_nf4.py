"""NF4Weight against the installed bitsandbytes: equal bytes in both directions; errors; sizes."""

import copy
import pickle

import pytest
import torch
from nf4_bitsandbytes import F, oracle, same_bytes, same_state
from properties import given, settings, st

from lora_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from lora_kernels.backends.torch.nf4 import CHUNK, block_absmax, column_tiles, tiles
from lora_kernels.functional.nf4 import quantize
from lora_kernels.nf4.tables import NF4_WORDS, code_values, dynamic_map
from lora_kernels.nf4.weight import BLOCKSIZES

pytestmark = pytest.mark.usefixtures("cpu_loops")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(128, 256), (67, 100), (33, 130), (1, 1), (5, 7), (1001,), (3, 64, 7), (2, 4096)]


def check(weight, blocksize=64, double_quant=True, quant_type="nf4"):
    codes, state = F.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type, quant_storage=torch.uint8
    )
    w = quantize(weight, quant_type, blocksize, double_quant)
    w.check()
    same_state(w, codes, state)
    same_state(NF4Weight.from_bnb(codes, state), codes, state)
    for dtype in DTYPES:
        same_bytes(w.dequantize(dtype), oracle(codes, state, dtype))
        if weight.ndim == 2 and weight.shape[1] % blocksize == 0 and blocksize < 2048:
            native = torch.ops.bitsandbytes.dequantize_4bit
            found = native(codes, block_absmax(w), blocksize, quant_type, weight.shape, dtype)
            normal = found.abs() >= torch.finfo(dtype).tiny  # AVX512's conversion to bf16 flushes denormals
            same_bytes(w.dequantize(dtype)[normal], found[normal])
    same_bytes(w.dequantize(), w.dequantize(weight.dtype))
    return w


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_bitsandbytes(dtype, blocksize, double_quant):
    for shape in SHAPES:
        check(torch.randn(shape).to(dtype), blocksize, double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4(dtype):
    for shape in SHAPES:
        check(torch.randn(shape).to(dtype), 64, True, "fp4")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    exponent=st.integers(-149, 120),
    blocksize=st.sampled_from(BLOCKSIZES),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
def test_random_shapes_and_magnitudes(rows, columns, exponent, blocksize, double_quant, dtype, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    limit = 12 if dtype == torch.float16 else 110 if double_quant else 120  # the mean of absmax sums them up in float32
    check((weight.double() * 2.0 ** min(exponent, limit)).to(dtype), blocksize, double_quant)


@pytest.mark.parametrize("double_quant", [False, True])
def test_special_values(double_quant):
    largest = torch.finfo(torch.float32).max
    weight = torch.randn(40, 64)
    weight[1] = 0.0
    weight[2] = -0.0
    weight[3] *= 1e-42
    weight[4, 1:] = 0
    weight[5:9] *= 1e-38
    check(weight, double_quant=double_quant)
    check(torch.zeros(10, 77), double_quant=double_quant)
    check(torch.full((3, 64), 0.25), double_quant=double_quant)
    weight[9], weight[10, 0] = largest, -largest
    check(weight, double_quant=False)


def test_values_beside_every_threshold():
    """The codes' midpoints, and the floats on both sides of each, in blocks whose absmax is 1."""
    values = code_values("nf4")
    middle = (values[:-1] + values[1:]) / 2
    around = [middle, torch.nextafter(middle, torch.tensor(2.0)), torch.nextafter(middle, torch.tensor(-2.0)), values]
    cells = torch.arange(33) / 16 - 1
    around += [cells, torch.nextafter(cells, torch.tensor(2.0)), torch.nextafter(cells, torch.tensor(-2.0)).clamp(min=-1)]
    row = torch.cat([torch.ones(1), *around])
    w = check(torch.nn.functional.pad(row, (0, 256 - len(row))).clamp(-1, 1).view(1, -1), 256, False)
    nibbles = torch.stack([w.codes >> 4, w.codes & 15], 1).flatten()
    assert torch.equal(nibbles[1:16], torch.arange(15, dtype=torch.uint8))  # a tie goes to the lower code
    assert torch.equal(nibbles[16:31], torch.arange(1, 16, dtype=torch.uint8))


def test_every_bf16_and_fp16_value():
    """All finite 16-bit values, 64 neighbours a block."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        check(every[every.isfinite()].view(-1, 64), double_quant=dtype == torch.float16)


def test_several_chunks():
    check(torch.randn(3, CHUNK // 2 + 63).bfloat16())
    check(torch.randn(1021, 1025), 128)


def test_transposed_and_strided_inputs():
    weight = torch.randn(96, 130)
    same_state(quantize_nf4(weight.T), *F.quantize_4bit(weight.T.contiguous(), quant_type="nf4", compress_statistics=True))
    part = weight[:, 3:67]
    same_state(quantize_nf4(part), *F.quantize_4bit(part.contiguous(), quant_type="nf4", compress_statistics=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(1024, 1030), (5, 3)])
def test_what_is_not_finite_is_refused(bad, shape):
    weight = torch.randn(shape)
    position = shape[0] - 2, shape[1] - 1
    weight[position] = bad
    weight[shape[0] - 1] = bad
    with pytest.raises(ValueError, match=rf"weight: got {bad} at \({position[0]}, {position[1]}\)"):
        quantize_nf4(weight)


def test_an_overflowing_mean_is_refused():
    with pytest.raises(ValueError, match="use double_quant=False"):
        quantize_nf4(torch.full((4, 64), torch.finfo(torch.float32).max))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.ones(2, 2).double(),), TypeError, "weight: got dtype torch.float64"),
        ((torch.ones(2, 2).int(),), TypeError, "weight: got dtype torch.int32"),
        (([1.0],), TypeError, "weight: got list"),
        ((torch.ones(2, 2), 48), ValueError, "blocksize: got 48, expected one of 32, 64"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        quantize_nf4(arguments[0], **({"blocksize": arguments[1]} if len(arguments) > 1 else {}))


def test_tables():
    assert torch.equal(code_values("nf4"), F.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(code_values("fp4"), F.get_4bit_type("fp4", device="cpu"))
    stored = F.create_dynamic_map()
    assert (dynamic_map() - stored).abs().max() <= 1e-7  # its last bits depend on the CPU that made it
    assert len(NF4_WORDS.split()) == 16


def test_tables_are_real_when_first_made_under_a_mode():
    from lora_kernels.nf4 import tables as nf4_tables

    nf4_tables.code_values.__wrapped__  # noqa: B018  # the undecorated function is there
    for function in ("nf4_cells", "pair_table"):
        make = nf4_tables.constant(getattr(nf4_tables, function).__wrapped__)
        with torch.device("meta"), torch.inference_mode():
            found = make(*(["nf4"] if function == "pair_table" else []), torch.device("cpu"))
        for tensor in found if isinstance(found, tuple) else (found,):
            assert tensor.device.type == "cpu"
            assert not tensor.is_inference()


# ---- out, tiles, moving ----


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_out(dtype):
    w = quantize_nf4(torch.randn(70, 96).bfloat16())
    out = torch.full((70, 96), float("nan"), dtype=dtype)
    assert dequantize_nf4(w, out=out) is out
    assert torch.equal(out, w.dequantize(dtype))
    rows = torch.full((70, 120), float("nan"), dtype=dtype)
    dequantize_nf4(w, out=rows[:, 4:100])
    assert torch.equal(rows[:, 4:100], out)
    assert rows[:, :4].isnan().all()
    assert rows[:, 100:].isnan().all()
    one, row = quantize_nf4(torch.randn(1, 128)), torch.empty(1, 129, dtype=dtype)
    assert torch.equal(dequantize_nf4(one, out=row[:, 1:]), one.dequantize(dtype))


def test_out_that_does_not_fit():
    w = quantize_nf4(torch.randn(6, 64))
    with pytest.raises(ValueError, match=r"out: got torch.float32\[64, 6\]"):
        dequantize_nf4(w, out=torch.empty(64, 6))
    with pytest.raises(TypeError, match=r"dtype: got torch\.int32"):
        dequantize_nf4(w, out=torch.empty(6, 64, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"out: got torch\.float32"):
        dequantize_nf4(w, torch.bfloat16, out=torch.empty(6, 64))


@pytest.mark.parametrize(("N", "K", "blocksize"), [(5000, 256, 64), (40000, 64, 32), (3, 4096, 2048), (900, 1030, 64)])
def test_tiles_make_up_the_weight(N, K, blocksize):
    w = quantize_nf4(torch.randn(N, K).bfloat16(), blocksize=blocksize)
    expected = w.dequantize()
    found = torch.full((N, K), float("nan"))
    for rows, tile in tiles(w, torch.bfloat16, torch.float32):
        found[rows] = tile
    assert torch.equal(found, expected.float())
    if K % blocksize == 0:
        found = torch.full((N, K), float("nan"), dtype=torch.bfloat16)
        for columns, tile in column_tiles(w, torch.bfloat16):
            found[:, columns] = tile
        assert torch.equal(found, expected)


def test_bytes_and_bits_per_weight():
    w = quantize_nf4(torch.randn(4096, 256), double_quant=False)
    assert w.nbytes == 4096 * 256 // 2 + 4 * 4096 * 256 // 64
    nested = quantize_nf4(torch.randn(4096, 256))
    blocks = 4096 * 4
    assert nested.nbytes == 4096 * 128 + blocks + 4 * blocks // 256 + 4 * 256 + 4


def test_meta_and_copies():
    w = quantize_nf4(torch.randn(32, 65).bfloat16())
    meta = quantize_nf4(torch.empty(32, 65, dtype=torch.bfloat16, device="meta"))
    assert meta.nbytes == w.nbytes
    assert (meta.shape, meta.dtype, meta.device.type, meta.dequantize().shape) == (w.shape, w.dtype, "meta", w.shape)
    meta.check()
    assert w.to("meta").device.type == "meta"
    for other in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), w.to("cpu")):
        assert torch.equal(other.dequantize(), w.dequantize())
