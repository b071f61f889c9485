"""NF4Weight against the installed bitsandbytes: equal bytes in both directions; errors; sizes."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kernels import NF4Weight, dequantize_nf4, quantize_nf4
from lora_kernels.nf4.codec import CHUNK, block_absmax
from lora_kernels.nf4.state_dict import STORAGES, as_storage, from_state, to_state
from lora_kernels.nf4.tables import NF4_WORDS, code_values, dynamic_map
from lora_kernels.nf4.weight import BLOCKSIZES, column_tiles, quantize, tiles

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes.backends.default import ops as plain  # noqa: E402  # the oracle where its native code is wrong

pytestmark = pytest.mark.usefixtures("cpu_loops")
F = bnb.functional
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(128, 256), (67, 100), (33, 130), (1, 1), (5, 7), (1001,), (3, 64, 7), (2, 4096)]


def same_bytes(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_state(w, codes, state):
    same_bytes(w.codes, codes.view(-1))
    same_bytes(w.absmax, state.absmax)
    assert (w.shape, w.dtype, w.blocksize, w.quant_type) == (state.shape, state.dtype, state.blocksize, state.quant_type)
    assert w.nested == state.nested
    if w.nested:
        same_bytes(w.nested_absmax, state.state2.absmax)
        same_bytes(w.nested_map, state.state2.code)
        same_bytes(w.nested_offset, state.offset)


def oracle(codes, state, dtype):
    """bitsandbytes' dequantised values, by its plain PyTorch code: its AVX512 code misplaces absmax where K % blocksize != 0,
    and reads what is nested as an array of shape[0] = 1 if the weight is a vector.
    """
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    compute = plain._dequantize_4bit_compute.__wrapped__
    return compute(codes.view(-1), absmax, state.code, state.blocksize, state.shape, dtype)


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


# ---- bitsandbytes' objects and keys ----


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_to_and_from_bitsandbytes_share_bytes(double_quant, quant_type):
    w = quantize(torch.randn(128, 192).bfloat16(), quant_type, 64, double_quant)
    codes, state = w.to_bnb()
    assert codes.shape == (128 * 96, 1)
    assert codes.data_ptr() == w.codes.data_ptr()
    same_bytes(F.dequantize_4bit(codes, state), w.dequantize())
    again = NF4Weight.from_bnb(codes, state)
    same_state(again, codes, state)
    assert again.codes.data_ptr() == w.codes.data_ptr()
    assert again.absmax.data_ptr() == w.absmax.data_ptr()


@pytest.mark.parametrize("storage", STORAGES)
def test_quant_storage(storage):
    weight = torch.randn(64, 64)
    codes, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, quant_storage=storage)
    w = NF4Weight.from_bnb(codes, state)
    assert torch.equal(w.dequantize(), quantize_nf4(weight).dequantize())
    assert w.codes.data_ptr() == codes.data_ptr()
    stored = as_storage(w.codes, storage)
    assert stored.dtype == storage
    same_bytes(stored, codes)


def test_storage_that_does_not_divide():
    w = quantize_nf4(torch.randn(1, 33))
    with pytest.raises(ValueError, match=r"quant_storage: got torch\.float32 for 17 bytes"):
        as_storage(w.codes, torch.float32)


def test_a_params4bit_alone():
    layer = bnb.nn.Linear4bit(64, 96, quant_type="nf4").to("cpu")
    w = NF4Weight.from_bnb(layer.weight)
    assert type(w.codes) is torch.Tensor
    assert w.codes.data_ptr() == layer.weight.data_ptr()
    with pytest.raises(TypeError, match="without a quant_state"):
        NF4Weight.from_bnb(bnb.nn.Linear4bit(64, 96).weight)


def stored(w):
    """What bitsandbytes' own layer writes for w."""
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False)
    codes, state = w.to_bnb()
    layer.weight = bnb.nn.Params4bit(codes, quant_state=state, bnb_quantized=True)
    return {name.removeprefix("weight."): value.clone() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_is_that_of_bitsandbytes(double_quant, quant_type):
    w = quantize(torch.randn(128, 256).half(), quant_type, 128, double_quant)
    expected = stored(w)
    codes, found = expected.pop("weight"), to_state(w)
    assert list(found) == list(expected)
    for name in expected:
        same_bytes(found[name], expected[name])
    again = from_state(codes, expected)
    same_state(again, *w.to_bnb())
    loaded = bnb.nn.Params4bit.from_prequantized(w.codes[:, None], dict(found), device="cpu")
    same_bytes(F.dequantize_4bit(loaded, loaded.quant_state), w.dequantize())


def edit(state, **changes):
    (key,) = (name for name in state if name.startswith("quant_state"))
    scalars = json.loads(bytes(state[key].tolist())) | changes
    scalars = {name: value for name, value in scalars.items() if value is not ...}
    return {**state, key: torch.tensor(list(json.dumps(scalars).encode()), dtype=torch.uint8)}


NF4_KEY = "quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "absmax"}, r"lacks \['absmax'\]"),
        (lambda s: {k: v for k, v in s.items() if k != "nested_quant_map"}, r"lacks \['nested_quant_map'\]"),
        (lambda s: {k: v for k, v in s.items() if k != NF4_KEY}, "expected one key"),
        (lambda s: {k: v for k, v in s.items() if k != "nested_absmax"}, "unknown"),
        (lambda s: {**s, "surprise": torch.ones(1)}, r"unknown \['surprise'\]"),
        (lambda s: {**s, "absmax": s["absmax"][:-1]}, "absmax: got .* is the state truncated"),
        (lambda s: {**s, "absmax": s["absmax"].float()}, "absmax: got torch.float32"),
        (lambda s: {**s, "nested_absmax": s["nested_absmax"].half()}, "nested_absmax: got torch.float16"),
        (lambda s: {**s, "nested_quant_map": s["nested_quant_map"][:255]}, "nested_map: got"),
        (lambda s: {**s, NF4_KEY: s[NF4_KEY][:-3]}, "expected JSON"),
        (lambda s: {**s, NF4_KEY: s[NF4_KEY].float() / 7}, "expected JSON"),
        (lambda s: {**s, NF4_KEY: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "expected an object"),
        (lambda s: edit(s, blocksize=63), "blocksize: got 63"),
        (lambda s: edit(s, blocksize="64"), "blocksize is '64'"),
        (lambda s: edit(s, blocksize=128), "absmax: got"),
        (lambda s: edit(s, dtype="int8"), "dtype is 'int8'"),
        (lambda s: edit(s, shape=[64, 65]), "is the state truncated"),
        (lambda s: edit(s, shape=[-64, -64]), "shape is"),
        (lambda s: edit(s, quant_type="fp4"), "quant_type is 'fp4'"),
        (lambda s: edit(s, nested_offset=float("nan")), "nested_offset is nan"),
        (lambda s: edit(s, nested_offset=...), r"lacks \['nested_offset'\]"),
        (lambda s: edit(s, nested_blocksize=64), "nested_blocksize is 64"),
        (lambda s: edit(s, extra=1), r"unknown \['extra'\]"),
    ],
)
def test_corrupt_states(change, words):
    w = quantize_nf4(torch.randn(64, 64))
    state = to_state(w)
    assert torch.equal(from_state(w.codes, state, "base.weight").dequantize(), w.dequantize())
    with pytest.raises(ValueError, match=rf"base\.weight.*{words}"):
        from_state(w.codes, change(state), "base.weight")


def test_truncated_codes():
    w = quantize_nf4(torch.randn(64, 64))
    with pytest.raises(ValueError, match="weight: codes: got"):
        from_state(w.codes[:-1], to_state(w))


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_that_bitsandbytes_repacked_for_its_cpu_kernel(double_quant):
    w = quantize_nf4(torch.randn(64, 128).bfloat16(), double_quant=double_quant)
    absmax = block_absmax(w).bfloat16().float()
    codes, state = F._convert_weight_packed_for_cpu(*w.to_bnb())
    with pytest.warns(UserWarning, match="repacked"):
        again = NF4Weight.from_bnb(codes, state)
    again.check()
    same_bytes(again.codes, w.codes)
    same_bytes(again.absmax, absmax)
    assert (again.shape, again.dtype) == (w.shape, w.dtype)
