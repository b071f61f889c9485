"""What the extension refuses, before it looks for a device."""

import importlib
import importlib.util

import pytest
from csrc_emulator import emulated


@pytest.fixture(scope="module")
def extension():

    return importlib.import_module("lora_kernels._C") if importlib.util.find_spec("lora_kernels._C") else emulated()


GOOD = {
    "codes": 16, "absmax": 16, "nested_absmax": 0, "nested_map": 0, "nested_offset": 0, "rows": 8, "columns": 64,
    "blocksize": 64, "values": [0.0] * 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows: got 0, expected at least 1"),
        ({"columns": -1}, "columns: got -1"),
        ({"rows": 1 << 62}, "rows: got 4611686018427387904, expected fewer than"),
        ({"blocksize": 48}, "blocksize: got 48, expected a power of two of at least 32"),
        ({"blocksize": 16}, "blocksize: got 16"),
        ({"codes": 0}, "codes: got null"),
        ({"absmax": 0}, "absmax: got null"),
        ({"nested_map": 16}, "nested_absmax, nested_map, nested_offset: got 1, expected all three, or none"),
    ],
)
def test_weights_that_do_not_fit(extension, change: dict, message: str) -> None:
    w = extension.Weight(**{**GOOD, **change})
    bf16 = extension.Dtype.bf16
    with pytest.raises(ValueError, match=f"^nf4_dequantize: {message}"):
        extension.nf4_dequantize(w, 16, 64, bf16, 0)
    with pytest.raises(ValueError, match=f"^nf4_skinny: {message}"):
        extension.nf4_skinny(w, 16, 64, 0, 0, 0, 16, 1, 0, 1.0, 0, bf16, bf16, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"M": 17}, "it takes 1 to 16 tokens"),
        ({"M": 0}, "it takes 1 to 16 tokens"),
        ({"dtype": "fp32"}, "dtype: got fp32, expected bf16 or fp16"),
        ({"x": 8}, "x: got 8, expected an address that is a multiple of 16"),
        ({"y": 0}, "x or y: got null"),
        ({"R": -1}, "R: got -1"),
        ({"R": 4}, "h or B: got null, expected an address where R > 0"),
        ({"x_stride": 65}, "x_stride: got 65, expected a multiple of 8"),
        ({"weight": {"codes": 20}}, "codes: got 20, expected an address that is a multiple of 8"),
        ({"weight": {"columns": 72}}, "a row must hold a multiple of 16 codes"),
        ({"weight": {"rows": 1 << 32}}, "it counts units of 16 codes in 32 bits"),
    ],
)
def test_skinny_calls_that_do_not_fit(extension, change: dict, message: str) -> None:
    call = {
        "x": 16, "x_stride": 64, "h": 0, "B": 0, "c": 0, "y": 16, "M": 1, "R": 0, "scale": 1.0, "scale_address": 0,
        "dtype": "bf16", "adapter_dtype": "bf16", "stream": 0,
    } | change  # fmt: skip
    w = extension.Weight(**{**GOOD, **call.pop("weight", {})})
    dtypes = {name: getattr(extension.Dtype, call.pop(name)) for name in ("dtype", "adapter_dtype")}
    with pytest.raises(ValueError, match=f"^nf4_skinny: {message}"):
        extension.nf4_skinny(w, **call, **dtypes)


def test_other_calls_that_do_not_fit(extension) -> None:
    w, bf16 = extension.Weight(**GOOD), extension.Dtype.bf16
    with pytest.raises(ValueError, match="nf4_dequantize: row_stride: got 63"):
        extension.nf4_dequantize(w, 16, 63, bf16, 0)
    with pytest.raises(ValueError, match="nf4_dequantize: out: got null"):
        extension.nf4_dequantize(w, 0, 64, bf16, 0)
    with pytest.raises(ValueError, match="nf4_quantize: elements: got 0"):
        extension.nf4_quantize(16, 0, bf16, 64, [0.0] * 16, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="nf4_quantize: blocksize: got 65"):
        extension.nf4_quantize(16, 64, bf16, 65, [0.0] * 16, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="nf4_quantize: weight, codes, absmax or first_bad: got null"):
        extension.nf4_quantize(16, 64, bf16, 64, [0.0] * 16, 16, 0, 16, 0)
    with pytest.raises(ValueError, match="nf4_quantize_absmax: blocks: got 0"):
        extension.nf4_quantize_absmax(16, 0, 16, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="nf4_quantize_absmax: an array: got null"):
        extension.nf4_quantize_absmax(16, 1, 0, 16, 16, 16, 0)
    with pytest.raises(TypeError):
        extension.nf4_dequantize(w, 16, 64, "bf16", 0)
    with pytest.raises(TypeError):
        extension.Weight(**{**GOOD, "values": [0.0] * 15})
