"""Few tokens times a 4-bit weight in csrc/cpu: W to the bit, dtypes and layouts under the rule; mistakes that are caught."""

import pytest
import torch
from accuracy import Case, check
from cpu_extension_build import compiled

from lora_kernels import cpu_extension, use_backend
from lora_kernels.backends.torch import nf4_product
from lora_kernels.functional.nf4 import quantize
from lora_kernels.operation import prepared

NARROW = [torch.bfloat16, torch.float16, torch.float32]
PLAIN = ("nf4_product.cpp", "FOR_EACH_CPU void", "void")


@pytest.fixture(scope="module", params=["for this CPU", "for the least"])
def extension(request, tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("right"), *([PLAIN] if request.param == "for the least" else []))


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
    monkeypatch.setattr(prepared, "_kinds", {})
    with use_backend("torch"):
        yield found


def weight(quant_type="nf4", blocksize=64, double_quant=True, dtype=torch.bfloat16, N=37, K=256):
    return quantize(
        torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(dtype), quant_type, blocksize, double_quant
    )


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128, 256])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_unit_vectors_give_the_weight_to_the_bit(products, dtype, quant_type, blocksize, double_quant, threads):
    w = weight(quant_type, blocksize, double_quant)
    dense, before = w.dequantize(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for columns in torch.arange(256).split(16):
            x = torch.eye(256, dtype=dtype)[columns]
            assert torch.equal(nf4_product.linear(x, w, None), dense[:, columns].T)
    finally:
        torch.set_num_threads(before)
    assert products == [16] * 16


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 7, 8, 11, 15, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_tokens(products, M, dtype, bias):
    check(Case(M=M, K=192, N=67, R=4, p=0.2, dtype=dtype, quant_type="nf4", bias=bias))
    assert M in products


@pytest.mark.parametrize("dtype", NARROW)
def test_a_weight_of_many_tiles(products, dtype):
    check(Case(M=5, K=1024, N=1300, R=4, dtype=dtype, quant_type="nf4", double_quant=False))
    assert 5 in products


@pytest.mark.parametrize("dtype", NARROW)
def test_rows_that_lie_apart(products, dtype):
    check(Case(M=(2, 3), K=128, dtype=dtype, quant_type="fp4", strided=True))
    assert 6 in products


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(M=17, K=128, quant_type="nf4"), "more tokens"),
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


MISTAKES = [
    ("i % 2 ? 0 : 4", "i % 2 ? 4 : 0"),
    ("28 - shift", "27 - shift"),
    ("i / 2 * 8", "i / 2 * 4"),
    ("k % 8 * 8 + k % GROUP / 8", "k % GROUP"),
    ("absmax[block]);", "absmax[0]);"),
    ("n * blocks, (n + 1) * blocks", "0, blocks"),
    ("as_float(*out) + sum", "sum"),
    ("(row + m) * p.y_stride", "m * p.y_stride"),
    ("x + m * p.K + k", "x + k"),
    ("n += ROWS_OF_W", "n += 2 * ROWS_OF_W"),
    ("[m * x_stride + k]", "[m * K + k]"),
    ("; i < WIDE; ++i) sum", "; i < WIDE - 1; ++i) sum"),
]


@pytest.mark.parametrize(("old", "new"), MISTAKES, ids=[old for old, _ in MISTAKES])
def test_a_mistake_is_caught(old, new, tmp_path, monkeypatch):
    broken = compiled(tmp_path, ("nf4_product.cpp", old, new))
    monkeypatch.setattr(cpu_extension, "extension", broken)
    monkeypatch.setattr(prepared, "_kinds", {})
    with use_backend("torch"), pytest.raises(AssertionError):
        check(Case(M=13, K=256, N=50, dtype=torch.float32, quant_type="nf4", strided=True))
