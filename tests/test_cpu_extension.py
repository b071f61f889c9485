"""csrc/cpu, compiled here from its source: the bits of the operations in dropout.py and nf4_codec.py."""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cpu_extension_build import SOURCES, compiled
from torch import Tensor

from lora_kernels import backend_report, cpu_extension, dequantize_nf4, dropout_mask, lora_linear, quantize_nf4, use_backend
from lora_kernels.backends.torch.nf4 import column_tiles, tiles
from lora_kernels.mask import KeepRows, drop
from lora_kernels.nf4 import NF4Weight

CPUINFO = Path("/proc/cpuinfo")
SEED = -0x0123456789ABCDEF
AVX512, AVX2 = (flag in CPUINFO.read_text() if CPUINFO.exists() else False for flag in ("avx512bw", "avx2"))


@pytest.fixture(scope="module", params=["for this CPU", "without AVX-512 and AVX2"])
def extension(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("right")
    if request.param == "for this CPU":
        return compiled(folder)
    return compiled(folder, ("nf4.h", "#define HAVE_AVX512", "//"), ("mask.cpp", "#define HAVE_AVX2", "//"), optimize="-O1")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """both(extension, function): (function's result with it, by PyTorch operations)."""

    def compute(extension: ModuleType, function: Callable[[], Any]) -> tuple[Any, Any]:
        results = []
        for setting in (extension, None):
            with monkeypatch.context() as patch:
                patch.setattr(cpu_extension, "extension", setting)
                results.append(function())
        return results[0], results[1]

    return compute


# ---- masks ----


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 7, 511, 512, 513, 2000])
@pytest.mark.parametrize(("first", "M"), [(0, 0), (0, 1), (3, 33), (2**32 - 40, 40)])
def test_masks(extension, threads, both, dtype, K, first, M):
    for p, offset in ((0.1, 0), (0.77, 2**64 - 3), (1.0, 5), (0.0, 1 << 32)):
        keep_rows = KeepRows(K, p, torch.tensor(SEED), offset=offset, dtype=dtype)
        got, want = both(extension, lambda keep_rows=keep_rows: keep_rows(slice(first, first + M)).clone())
        assert got.dtype == dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [1, 63, 513, 600])
def test_dropped_values(extension, threads, both, dtype, K):
    """Of rows that lie apart, in place, and not a number where it is kept or not."""
    v = torch.randn(33, K + 5, dtype=dtype)[:, 2 : K + 2]
    v[7] = float("nan")
    for p, offset, in_place in ((0.1, 0, False), (1.0, 3, True), (0.5, 2**64 - 1, True)):

        def dropped(p=p, offset=offset, in_place=in_place) -> Tensor:
            w = v.clone() if in_place else v
            return drop(w, p, torch.tensor(SEED), offset, out=w if in_place else None)

        got, want = both(extension, dropped)
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_bad_dtype(extension):
    out = torch.empty(2, 8)
    with pytest.raises(ValueError, match="got dtype int8, expected bool"):
        extension.keep_rows(out.data_ptr(), "int8", 0, 2, 8, 100, 0, 0, 1)
    weight = extension.Weight(*[out.data_ptr()] * 6, 64)
    with pytest.raises(ValueError, match="got dtype int8, expected bfloat16"):
        extension.nf4_decode(weight, out.data_ptr(), "int8", 8, 2, 8, 0, 8, 1)
    with pytest.raises(ValueError, match="got elements of 2 bytes, expected 4 or 8"):
        extension.drop_rows(out.data_ptr(), out.data_ptr(), 8, 2, 2, 8, 100, 1.0, 0, 0, 1)
    with pytest.raises(ValueError, match="Rows: got dtype int8, expected float32"):
        extension.low_rank_forward((0, 0, "int8"), *[None] * 2, *[0] * 4, 1.0, 1.0, *[0] * 4, None, None, False, None, 1)


# ---- 4-bit weights ----


def weights() -> list[NF4Weight]:
    """Odd sizes, blocks over rows' ends, plain and nested absmax."""
    torch.manual_seed(0)
    draws = (
        ((5, 7), {"blocksize": 32, "double_quant": False}),
        ((33, 129), {"blocksize": 64}),
        ((300, 320), {"blocksize": 64}),
        ((3, 5000), {"blocksize": 4096, "double_quant": False}),
    )
    return [quantize_nf4(torch.randn(shape) * 0.02, **options) for shape, options in draws]


def bits(t: Tensor) -> Tensor:
    return t.clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def part_of_longer_rows(w: NF4Weight, dtype: torch.dtype) -> Tensor:
    N, K = w.shape
    rows = torch.full((N, K + 3), 7.0, dtype=dtype)
    dequantize_nf4(w, out=rows[:, 1 : K + 1])
    return rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dequantised_weights(extension, threads, both, dtype):
    for w in weights():
        for dequantise in (dequantize_nf4, part_of_longer_rows):
            got, want = both(extension, lambda w=w, dequantise=dequantise: dequantise(w, dtype))
            assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tiles_of_rows_and_columns(extension, threads, both, monkeypatch, dtype):
    monkeypatch.setattr("lora_kernels.backends.torch.nf4.tile_size", lambda device: 4096)
    w = weights()[2]
    for make in (
        lambda: [bits(tile) for _, tile in tiles(w, dtype, dtype)],
        lambda: [bits(tile) for _, tile in tiles(w, dtype, torch.float32)],
        lambda: [bits(tile) for _, tile in column_tiles(w, dtype)],
    ):
        got, want = both(extension, make)
        assert len(got) > 1
        assert all(map(torch.equal, got, want))


def test_rounding_of_any_value(extension, both):
    """Ties, subnormals, overflow and what is not finite: PyTorch's conversions."""
    exponents = torch.arange(-149, 128).double()
    steps = torch.tensor([0, 1, 2, 3, 2**10, 2**12, 3 * 2**12, 2**13 - 1, 2**15, 3 * 2**15, 2**16 - 1]).double() * 2.0**-23
    absmax = (2.0 ** exponents[:, None] * (1 + steps)).float().flatten()
    special = torch.tensor([0.0, 65504.0, 65519.996, 65520.0, float("inf"), float("nan"), 2.0**-25, 1.5 * 2.0**-25])
    every_bit = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # CUDA's NaN: carries over when rounded
    absmax = torch.cat([absmax, torch.randn(3000) * 2.0 ** torch.randint(-30, 18, (3000,)), special, every_bit])
    absmax = torch.cat([absmax, -absmax])
    codes = torch.full((16 * len(absmax),), 0xFF, dtype=torch.uint8)  # code 15 is 1.0: each value of a block is its absmax
    w = NF4Weight(codes, absmax, None, None, None, torch.Size((len(absmax), 32)), torch.float32, 32)
    for dtype in (torch.bfloat16, torch.float16):
        got, _ = both(extension, lambda dtype=dtype: dequantize_nf4(w, dtype))
        nan, want = absmax.isnan(), absmax.to(dtype)
        assert torch.equal(bits(got[~nan, 5]), bits(want[~nan]))
        assert got[nan].isnan().all()


def test_what_it_cannot_address_goes_to_operations(extension, monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", extension)
    w = weights()[1]
    spread = w.with_tensors(absmax=w.absmax.repeat_interleave(2)[::2])  # not contiguous
    assert torch.equal(spread.dequantize(), w.dequantize())
    assert w.to("meta").dequantize().shape == w.shape
    columns = torch.empty(w.shape[1], w.shape[0]).T
    assert torch.equal(dequantize_nf4(w, out=columns), w.dequantize())


# ---- mistakes ----

MASK_MISTAKES = {
    "a round too few": ("mask.cpp", "ROUNDS = 7", "ROUNDS = 6"),
    "multipliers swapped": ("mask.cpp", "M0 = 0xD2511F53, M1 = 0xCD9E8D57", "M0 = 0xCD9E8D57, M1 = 0xD2511F53"),
    "the threshold itself is dropped": ("mask.h", "(lanes[i]) >= mask", "(lanes[i]) > mask"),
    "an odd lane over its even one": ("mask.cpp", "2 * word + 1]", "2 * word]"),
    "offset's halves swapped": (
        "mask.cpp",
        "c2 = mask.offset[0], c3 = mask.offset[1]",
        "c2 = mask.offset[1], c3 = mask.offset[0]",
    ),
    "each tile is the first": ("mask.h", "static_cast<std::uint32_t>(column / LANES)", "static_cast<std::uint32_t>(0)"),
    "the last tiles begin again": (
        "mask.h",
        "keep_tile<T, NARROW>(kept, one, k, row",
        "keep_tile<T, NARROW>(kept, one, 0, row",
    ),
    "offset's halves swapped in a vector": ("mask.cpp", "c2 = offset0, c3 = offset1", "c2 = offset1, c3 = offset0"),
    "blocks out of order in a vector": ("mask.cpp", "(even, odd, 0x20)", "(odd, even, 0x20)"),
    "words out of order in a vector": ("mask.cpp", "unpacklo_epi64(first, second)", "unpacklo_epi64(second, first)"),
}
DECODE_MISTAKES = {
    "nibbles swapped": ("out[0] = value[byte >> 4];", "out[0] = value[byte & 15];"),
    "an odd start": ("codes[start++ / 2] & 15", "codes[start++ / 2] >> 4"),
    "the next block's nested absmax": ("[block / NESTED_BLOCK]", "[(block + 1) / NESTED_BLOCK]"),
    "one rounding of a nested absmax": (
        "return entry * pointer<float>(w.nested_absmax)[block / NESTED_BLOCK] + *pointer<float>(w.nested_offset);",
        "return std::fma(entry, pointer<float>(w.nested_absmax)[block / NESTED_BLOCK], *pointer<float>(w.nested_offset));",
    ),
    "codes swapped in a vector": ("pairs >> 4 | (pairs & 15) << half", "(pairs & 15) | pairs >> 4 << half"),
    "a gap between segments": ("i % per_row * SEGMENT", "i % per_row * (SEGMENT + 1)"),
}


@pytest.mark.parametrize("mistake", MASK_MISTAKES)
def test_a_mistake_in_masks_is_seen(mistake, tmp_path, both):
    vector = "vector" in mistake
    if vector and not AVX2:
        pytest.skip("this CPU has no AVX2")
    keep_rows = KeepRows(1100, 0.1, torch.tensor(SEED), offset=7)
    portable = () if vector else (("mask.cpp", "#define HAVE_AVX2", "//"),)
    wrong = compiled(tmp_path, MASK_MISTAKES[mistake], *portable)
    assert not torch.equal(*both(wrong, lambda: keep_rows(slice(0, 300)).clone()))


@pytest.mark.parametrize("mistake", DECODE_MISTAKES)
def test_a_mistake_in_decoding_is_seen(mistake, tmp_path, both):
    if "vector" in mistake and not AVX512:
        pytest.skip("this CPU has no AVX-512")

    def decoded() -> list[Tensor]:
        parts = itertools.product((dequantize_nf4, part_of_longer_rows), weights(), (torch.bfloat16, torch.float32))
        return [dequantise(w, dtype) for dequantise, w, dtype in parts]

    old, new = DECODE_MISTAKES[mistake]
    (file,) = [name for name in ("nf4.h", "nf4_decode.cpp") if old in (SOURCES / name).read_text()]
    got, want = both(compiled(tmp_path, (file, old, new)), decoded)
    assert not all(map(torch.equal, got, want))


# ---- the package ----


def test_a_layer_computes_with_it(extension, monkeypatch):
    """The same seed, the same output and gradients, bit for bit."""

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        x, A, B = (torch.randn(shape, requires_grad=True) for shape in ((33, 70), (8, 70), (40, 8)))
        with use_backend("torch"):
            y = lora_linear(x, quantize_nf4(torch.randn(40, 70)), A, B, scaling=2.0, dropout_p=0.3, seed=11)
        return [y, *torch.autograd.grad(y.square().sum(), (x, A, B))]

    calls = []
    monkeypatch.setattr(cpu_extension, "extension", None)
    want = results()
    monkeypatch.setattr(cpu_extension, "extension", extension)
    for name in ("drop_rows", "nf4_decode"):
        function = getattr(extension, name)
        monkeypatch.setattr(extension, name, lambda *args, f=function, n=name: (calls.append(n), f(*args)))
    assert all(map(torch.equal, results(), want))
    assert sorted(calls) == ["drop_rows"] * 3 + ["nf4_decode"] * 2


def test_one_of_other_sources_is_not_used(extension, monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_kernels._cpu", extension)
    assert cpu_extension.load() == (extension, "")
    monkeypatch.setattr(extension, "interface", 0)
    found, why = cpu_extension.load()
    assert found is None
    assert "built from other sources; build it again: python setup.py build_ext" in why


def test_where_it_is_not_built_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", None)
    monkeypatch.setattr(cpu_extension, "why_not", "csrc/cpu was not built")
    assert dropout_mask(2, 9, 0.5, 0).shape == (2, 9)
    used = next(row for row in backend_report(x=torch.ones(2, 2), weight=torch.ones(2, 2)) if row.used)
    assert used.backend == "torch"
    assert re.search("by PyTorch operations: csrc/cpu was not built", used.reason)
