"""NF4Weight to and from bitsandbytes' objects, storage dtypes and state-dict keys; corrupt states."""

import json

import pytest
import torch
from nf4_bitsandbytes import F, bnb, native, same_bytes, same_state

from lora_kernels import NF4Weight, quantize_nf4
from lora_kernels.backends.torch.nf4 import block_absmax
from lora_kernels.functional.nf4 import quantize
from lora_kernels.nf4.state_dict import from_state, to_state
from lora_kernels.nf4.storage import STORAGES, as_storage

pytestmark = pytest.mark.usefixtures("cpu_loops")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_to_and_from_bitsandbytes_share_bytes(double_quant, quant_type):
    w = quantize(torch.randn(128, 192).bfloat16(), quant_type, 64, double_quant)
    codes, state = w.to_bnb()
    assert codes.shape == (128 * 96, 1)
    assert codes.data_ptr() == w.codes.data_ptr()
    same_bytes(native(codes, state), w.dequantize())
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
    same_bytes(native(loaded, loaded.quant_state), w.dequantize())


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
