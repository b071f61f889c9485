"""Few tokens times a 4-bit weight in csrc/cpu: W to the bit, dtypes and layouts under the rule; mistakes that are caught."""

import pytest
import torch
from accuracy import Case, check
from cpu_extension_build import compiled

from lora_kernels import cpu_extension, use_backend
from lora_kernels.backends.torch import nf4_product
from lora_kernels.functional.nf4 import quantize
from lora_kernels.nf4 import NF4Weight
from lora_kernels.operation import prepared

NARROW = [torch.bfloat16, torch.float16, torch.float32]
V4 = '__attribute__((target("arch=x86-64-v4")))'
SUPPORTED = '__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")'
CHANGES = {
    "for this CPU": [],
    "for the least": [("nf4.h", "#define HAVE_AVX512", "//")],
    "16 lanes on any": [("nf4_product.cpp", V4, ""), ("nf4_product.cpp", SUPPORTED, "true")],  # the compiler takes them apart
}


@pytest.fixture(scope="module", params=CHANGES)
def extension(request, tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("right"), *CHANGES[request.param], optimize="-O1")


@pytest.fixture
def products(extension, monkeypatch):
    """A list that grows by the tokens of each product that the extension computes."""
    found, added = [], nf4_product.added

    def noted(y, x, w):
        done = added(y, x, w)
        found.extend([len(x)] * done)
        return done

    monkeypatch.setattr(cpu_extension, "extension", extension)
    monkeypatch.setattr(nf4_product, "added", noted)
    monkeypatch.setattr(nf4_product, "product_dtype", lambda dtype, device: torch.float32)  # whatever this CPU multiplies
    monkeypatch.setattr(prepared, "_kinds", {})
    with use_backend("torch"):
        yield found


def weight(quant_type="nf4", blocksize=64, double_quant=True, dtype=torch.bfloat16, N=37, K=256):
    return quantize(
        torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype), quant_type, blocksize, double_quant
    )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("blocksize", "threads"), [(64, 1), (128, 2), (256, 1)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_unit_vectors_give_the_weight_to_the_bit(products, dtype, quant_type, blocksize, double_quant, threads):
    w = weight(quant_type, blocksize, double_quant)
    dense, before = w.dequantize(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for columns in torch.arange(256).split(16):
            x = torch.eye(256, dtype=dtype)[columns]
            assert torch.equal(nf4_product.linear(x, w, None), dense[:, columns].T)
        differences = dense[:, ::16].float() - dense[:, 1::16].float()  # of rounded weights
        x = torch.eye(256, dtype=dtype)[::16] - torch.eye(256, dtype=dtype)[1::16]
        assert torch.equal(nf4_product.linear(x, w, None), differences.to(dtype).T)
    finally:
        torch.set_num_threads(before)
    assert products == [16] * 17


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 6, 7, 8, 11, 15, 16, 17, 48])
def test_tokens(products, M, dtype):
    check(Case(M=M, K=192, N=67, R=4, p=0.2, dtype=dtype, quant_type="nf4", bias=M % 2 == 1))
    assert M in products


def test_more_tokens_than_a_cpu_of_16_bits_wants(products, monkeypatch):
    monkeypatch.setattr(nf4_product, "product_dtype", lambda dtype, device: dtype)
    for M in (16, 17):
        check(Case(M=M, K=128, dtype=torch.bfloat16, quant_type="nf4"))
    assert set(products) == {16}


@pytest.mark.parametrize("dtype", NARROW)
def test_a_weight_of_many_tiles(products, dtype):
    check(Case(M=5, K=1024, N=1300, R=4, dtype=dtype, quant_type="nf4", double_quant=False))
    assert 5 in products


@pytest.mark.parametrize("dtype", NARROW)
def test_more_columns_than_a_thread_takes_at_a_time(products, dtype):
    check(Case(M=13, K=1088, N=50, dtype=dtype, quant_type="nf4", strided=True))
    assert 13 in products


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_that_lie_apart(products, dtype):
    check(Case(M=(2, 3), K=128, dtype=dtype, quant_type="fp4", strided=True))
    assert 6 in products


def test_tokens_whose_elements_lie_apart_are_left_to_pytorch(products):
    w, x = weight(), torch.randn(256, 5).T
    torch.testing.assert_close(nf4_product.linear(x, w, None), x @ w.dequantize(torch.float32).T)
    assert not products


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(M=49, K=128, quant_type="nf4"), "more tokens"),
        (Case(M=4, K=96, quant_type="nf4"), "blocks that cross rows"),
        (Case(M=4, K=128, quant_type="nf4", blocksize=32), "blocks of 32"),
        (Case(M=4, K=128, quant_type="nf4", dtype=torch.float64), "float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_are_decoded(products, case, why):
    check(case)
    assert not products


@pytest.mark.parametrize("case", [Case(M=0, K=128, quant_type="nf4"), Case(M=3, K=128, N=1, quant_type="nf4")], ids=str)
def test_hardly_any(products, case):
    check(case)


def halves_and_what_lies_between():
    """float32: each half from 0 on, the midpoint to the next one and its neighbours; and what is beyond all of them."""
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    middle = (halves + torch.cat([halves[1:], torch.tensor([65536.0])]).double()) / 2
    middle = middle.float().view(torch.int32)
    values = [halves.float(), *((middle + step).view(torch.float32) for step in (-1, 0, 1)), torch.tensor([70000.0, 3e38])]
    return torch.cat(values)


def rounded_by_products(absmax, dtype):
    """Each absmax rounded to `dtype`: the first element of a row of code 15, which is 1, and of code 7, which is 0."""
    codes = torch.full((len(absmax), 32), 0x77, dtype=torch.uint8)
    codes[:, 0] = 0xF7
    w = NF4Weight(codes.flatten(), absmax, None, None, None, torch.Size((len(absmax), 64)), torch.float32, 64)
    return nf4_product.linear(torch.eye(64, dtype=dtype)[:1], w, None)[0]


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_of_any_value(products, dtype):
    values = halves_and_what_lies_between()
    for absmax in (values, -values):
        assert torch.equal(rounded_by_products(absmax, dtype), absmax.to(dtype))
    assert rounded_by_products(torch.tensor([float("nan")]), dtype).isnan().all()
    assert products == [1, 1, 1]


ROUNDING_MISTAKES = [("127 - 14", "127 - 13"), ("(bits >> 16 & 1)) &", "1) &")]


@pytest.mark.parametrize(("old", "new"), ROUNDING_MISTAKES, ids=[old for old, _ in ROUNDING_MISTAKES])
def test_a_mistake_in_rounding_is_caught(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_extension, "extension", compiled(tmp_path, ("numbers.h", old, new)))
    values = halves_and_what_lies_between()
    assert not all(torch.equal(rounded_by_products(values, dtype), values.to(dtype)) for dtype in NARROW)


MISTAKES = [
    ("i % 2 ? 0 : 4", "i % 2 ? 4 : 0"),
    ("28 - shift", "27 - shift"),
    ("i / 2 * 8", "i / 2 * 4"),
    ("out[j * lanes + i]", "out[i * codes + j]"),
    ("p.values[n * p.blocks + block]", "p.values[n * p.blocks]"),
    ("n * all + block, n * all + block + blocks", "block, block + blocks"),
    ("as_float(*out) + sum", "sum"),
    ("(n * p.M + row)", "(n * p.M)"),
    ("p.first_column * COUNT", "0"),
    ("x + m * GROUP + i", "x + i"),
    ("n += ROWS_OF_W", "n += 2 * ROWS_OF_W"),
    ("x.at(first + row, k)", "x.at(row, k)"),
    ("; i < lanes; ++i) sum", "; i < lanes - 1; ++i) sum"),
]


@pytest.mark.parametrize(("old", "new"), MISTAKES, ids=[old for old, _ in MISTAKES])
def test_a_mistake_is_caught(old, new, tmp_path, monkeypatch):
    least = CHANGES["for the least"] if "shift" in old else []  # 16 lanes hold a whole table
    broken = compiled(tmp_path, ("nf4_product.cpp", old, new), *least)
    monkeypatch.setattr(cpu_extension, "extension", broken)
    monkeypatch.setattr(prepared, "_kinds", {})
    with use_backend("torch"), pytest.raises(AssertionError):
        check(Case(M=13, K=1088, N=50, dtype=torch.float32, quant_type="nf4", strided=True))
