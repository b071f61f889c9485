"""A suite that cannot fail is a defect: kernels with one deliberate mistake each, which the comparisons must see."""

import sys
from types import ModuleType

import pytest
import torch
from csrc_emulator import dequantised, emulated, quantised

from lora_kernels import quantize_nf4
from lora_kernels.nf4 import tables as nf4_tables
from lora_kernels.reference.nf4 import dequantize

WRONG = {
    "nibbles swapped": (
        "nf4.cuh",
        "values.of_code[byte >> 4], values.of_code[byte & 15]",
        "values.of_code[byte & 15], values.of_code[byte >> 4]",
    ),
    "one rounding of a nested absmax": (
        "nf4.cuh",
        "__fadd_rn(__fmul_rn(entry, absmax2), offset)",
        "__fmaf_rn(entry, absmax2, offset)",
    ),
    "PRMT takes the next byte": ("nf4.cuh", "0x4440 | b", "0x4440 | (b ^ 1)"),
    "a tie goes to the upper code": (
        "nf4_quantize.cu",
        "midpoints[count + half - 1] < value",
        "midpoints[count + half - 1] <= value",
    ),
    "the tail block multiplies": (
        "nf4_quantize.cu",
        "full ? __fmul_rn(value, reciprocal) : __fdiv_rn(value, held)",
        "__fmul_rn(value, reciprocal)",
    ),
    "the tail's absmax is another block's": (
        "nf4_dequantize.cu",
        "absmax_of(absmax, words >> log2_words)",
        "absmax_of(absmax, (words >> log2_words) - 1)",
    ),
    "fragments of x in another order": ("nf4_skinny.cu", "x[n][j / 2].z : x[n][j / 2].x", "x[n][j / 2].x : x[n][j / 2].z"),
    "rows g and g + 8 share an absmax": ("nf4_skinny.cu", "__fmul_rn(pair.y, scale[i % 2])", "__fmul_rn(pair.y, scale[0])"),
    "the sum forgets a warp": (
        "nf4_skinny.cu",
        "for (int w = 0; w < WARPS; w++) total",
        "for (int w = 1; w < WARPS; w++) total",
    ),
}


def agrees(cuda: ModuleType) -> bool:
    """Whether quantising, dequantising and the product of unit vectors give the bits of lora_kernels.nf4."""
    torch.manual_seed(0)
    values = torch.randn(24, 160)
    values[0, :64] = nf4_tables.thresholds("nf4", torch.device("cpu"))[0].repeat(5)[:64]
    values[0, 0] = 1.0
    values[-1, -5:] *= 3
    odd = values.flatten()[:-93]
    bounds = nf4_tables.thresholds("nf4", torch.device("cpu"))[0]
    cut_off = [torch.cat([bounds * largest, torch.tensor([largest])]) for largest in (1.1, 1.3, 2.7, 0.9)]
    for x in (values, odd, *cut_off):
        want, got = quantize_nf4(x), quantised(x)
        if any(not torch.equal(got.tensors()[name], tensor) for name, tensor in want.tensors().items()):
            return False
        if not torch.equal(dequantised(want), dequantize(want, want.dtype)):
            return False
    W, unit = quantize_nf4(values), torch.eye(160, dtype=torch.bfloat16)
    zero = torch.zeros(160, 1), torch.zeros(24, 1)
    products = [cuda.skinny(unit[m : m + 16], W, zero[0][:16], zero[1], 1.0, None) for m in range(0, 160, 16)]
    return torch.equal(torch.cat(products), dequantize(W, torch.bfloat16).T)


@pytest.mark.parametrize("mistake", [None, *WRONG])
def test_mistakes_are_seen(
    mistake: str | None, device: torch.device, monkeypatch: pytest.MonkeyPatch, cuda: ModuleType
) -> None:
    if device.type == "cuda":
        pytest.skip("mistakes are made in the emulator")
    extension = emulated(WRONG[mistake] if mistake else None)
    dtypes = {torch.bfloat16: extension.Dtype.bf16, torch.float16: extension.Dtype.fp16, torch.float32: extension.Dtype.fp32}
    for module in (cuda, cuda.extension, sys.modules[cuda.dequantize.__module__]):
        monkeypatch.setattr(module, "C", extension)
        monkeypatch.setattr(module, "DTYPES", dtypes)
    assert agrees(cuda) == (mistake is None)
