"""lora_grouped_linear and multi_lora_linear over the Triton kernels: segments of any sizes, ranks, dropouts and dtypes."""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import nan_in_fresh_memory
from members_accuracy import draw_and_run
from segments_accuracy import SIZES, check
from test_triton_mutants import decoded_tile_of_the_next_blocks
from triton_interpreter import DEVICE

from lora_kernels import LoRAAdapter, Segments, lora_grouped_linear, multi_lora_linear, quantize_nf4, use_backend
from lora_kernels.backends.triton import grouped_linear
from lora_kernels.backends.triton.kernels import segment_nf4_product, segments
from lora_kernels.cases.grouped_linear import GroupedCase, MultiCase
from lora_kernels.cases.members import ours
from lora_kernels.cases.rule import violations
from lora_kernels.functional.nf4 import quantize

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMS = {
    "own": (GroupedCase, {}),
    "shared": (GroupedCase, {"own": ()}),
    "shared weight": (GroupedCase, {"own": ("bias",)}),
    "shared bias": (GroupedCase, {"own": ("weight",)}),
    "adapters": (MultiCase, {}),
    "own in 4 bits": (GroupedCase, {"quant_type": "nf4", "K": 64, "N": 40}),
}


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def case(form: str, **options):
    kind, own = FORMS[form]
    return kind(**{**own, "M": 17, "device": DEVICE, **options})


@pytest.mark.parametrize(("form", "p"), [(form, 0.3) for form in FORMS] + [("own", 0.0), ("adapters", 0.0)])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dtypes(form: str, dtype: torch.dtype, p: float) -> None:
    check(case(form, dtype=dtype, p=p))


@pytest.mark.parametrize("form", ["own", "adapters"])
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(form: str, sizes: str) -> None:
    M, of_segments = SIZES[sizes]
    check(case(form, M=M, sizes=of_segments, p=0.3, dtype=FP16, K=70, N=133))


@pytest.mark.parametrize("form", ["own", "adapters"])
@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype_and_strides(form: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(case(form, dtype=dtypes[0], adapter_dtype=dtypes[1], strided=True, p=0.2, bias=False))


@pytest.mark.parametrize("form", ["own", "adapters"])
@pytest.mark.parametrize(
    "needs", [(), ("x",), ("lora_A",), ("lora_B",), ("bias",), ("weight",), ("x", "lora_A", "lora_B", "weight", "bias")]
)
def test_wanted_gradients(form: str, needs: tuple[str, ...]) -> None:
    """The host knows the sizes unless all are wanted."""
    check(case(form, dtype=FP16, p=0.3, needs=needs, host=len(needs) < 2, frozen=("adapter1",) if form == "adapters" else ()))


def test_ranks_scalings_and_dropout_of_all() -> None:
    check(case("own", R=64, p=1.0, dtype=BF16, scaling=torch.tensor(0.5, device=DEVICE)))
    check(
        case("adapters", p=1.0, ranks=(64, 1, 17, 4), scalings=(1.0, torch.tensor(-2.0, device=DEVICE), 0.0, 3.0), dtype=FP16)
    )


def test_many_segments_and_rows() -> None:
    sizes = tuple((7 * i) % 11 for i in range(19))
    check(case("own", M=sum(sizes) + 5, sizes=sizes, p=0.3, dtype=FP16))
    check(case("adapters", M=sum(sizes) + 5, sizes=sizes, ranks=(3,) * 19, scalings=(1.0,) * 19, p=0.3, dtype=FP16))


def test_rows_of_no_segment_meet_no_adapter() -> None:
    """The last one's numbers, which their programs load, are not finite: 0 times these would be NaN. No segment is empty: there
    are as many tiles as there can be.
    """
    x, W, A, B = (torch.randn(size, device=DEVICE) for size in ((5, 8), (2, 4, 8), (2, 3, 8), (2, 4, 3)))
    A[1] = B[1] = torch.inf
    x.requires_grad_()
    with nan_in_fresh_memory():
        y = lora_grouped_linear(x, W, A, B, Segments.from_ids(torch.tensor([0, 1, -1, -1, -1]), 2).to(DEVICE))
        (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y, dx):
        assert (result[2:] == 0).all()
        assert result[0].isfinite().all()


@pytest.mark.parametrize("form", ["own", "adapters"])
def test_the_same_bits_again(form: str) -> None:
    problem = case(form, M=129, sizes=(64, 33, 1, 20), p=0.3, dtype=FP16).draw()
    first, again = ours(problem), ours(problem)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_shared_4_bit_weight() -> None:
    check(case("shared", K=64, N=40, quant_type="nf4", dtype=FP16, p=0.3))


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_over_4_bits(sizes: str) -> None:
    """Rows of 66 codes begin inside of blocks."""
    M, of_segments = SIZES[sizes]
    check(case("own in 4 bits", M=M, sizes=of_segments, p=0.3, dtype=FP16, K=66, N=144))


@pytest.mark.parametrize(
    ("dtype", "N", "K", "quant_type", "blocksize", "nested"),
    [(BF16, 40, 64, "nf4", 64, True), (FP16, 64, 70, "fp4", 32, False), (FP32, 48, 96, "nf4", 128, True)],
)
def test_4_bit_weights_are_decoded_to_the_bit(
    dtype: torch.dtype, N: int, K: int, quant_type: str, blocksize: int, nested: bool
) -> None:
    """Times ones of a unit matrix, forward by columns of W and backward by rows; blocks are rows, parts of rows, or neither."""
    E = 2
    w = quantize(torch.randn(E, N, K, device=DEVICE).to(dtype), quant_type, blocksize, nested)
    W, A, B = w.dequantize(), *(torch.zeros(E, *size, device=DEVICE, dtype=dtype) for size in ((1, K), (N, 1)))
    x = torch.eye(K, device=DEVICE, dtype=dtype).repeat(E, 1)
    assert torch.equal(lora_grouped_linear(x, w, A, B, of_each(K)), W.mT.flatten(0, 1))
    x = torch.zeros(E * N, K, device=DEVICE, dtype=dtype, requires_grad=True)
    y = lora_grouped_linear(x, w, A, B, of_each(N))
    (dx,) = torch.autograd.grad(y, x, torch.eye(N, device=DEVICE, dtype=dtype).repeat(E, 1))
    assert torch.equal(dx, W.flatten(0, 1))


def of_each(rows: int, E: int = 2) -> Segments:
    return Segments.from_ids(torch.arange(E).repeat_interleave(rows), E).to(DEVICE)


def test_what_is_refused() -> None:
    x, A, B = torch.randn(4, 33, device=DEVICE), torch.ones(2, 3, 33, device=DEVICE), torch.ones(2, 64, 3, device=DEVICE)
    own = Segments.from_ids(torch.tensor([0, 0, 1, 1]), 2).to(DEVICE)
    with pytest.raises(RuntimeError, match="two rows of 33 codes share a byte"):
        lora_grouped_linear(x, quantize_nf4(torch.randn(2, 64, 33, device=DEVICE)), A, B, own)
    x = torch.randn(4, 64, device=DEVICE)
    wide = LoRAAdapter(torch.ones(65, 64, device=DEVICE), torch.ones(8, 65, device=DEVICE))
    with pytest.raises(RuntimeError, match="adapters of rank above 64 are ordinary products"):
        multi_lora_linear(x, torch.ones(8, 64, device=DEVICE), [wide, wide], own)


# ---- mistakes ----

tile_of, kept_tile, load_factor = segments.tile_of, segments.kept_tile, segments.load_factor
decoded_tile = segment_nf4_product.decoded_tile


@triton.jit
def rows_in_sorted_order(offsets, order, i_tile, E, M, BE: tl.constexpr, BM: tl.constexpr):
    return tile_of(offsets, None, i_tile, E, M, BE, BM)


@triton.jit
def the_segment_before(offsets, order, i_tile, E, M, BE: tl.constexpr, BM: tl.constexpr):
    e, o_j, inside, o_i = tile_of(offsets, order, i_tile, E, M, BE, BM)
    return tl.maximum(e - 1, 0), o_j, inside, o_i


@triton.jit
def rows_of_the_next_segment(offsets, order, i_tile, E, M, BE: tl.constexpr, BM: tl.constexpr):
    e, o_j, _, o_i = tile_of(offsets, order, i_tile, E, M, BE, BM)
    return e, o_j, o_j < M, o_i


@triton.jit
def dropout_for_all(seed, edge, o_row, column, COLUMNS: tl.constexpr):
    return kept_tile(seed, tl.where(edge == -1, 1 << 30, edge), o_row, column, COLUMNS)


@triton.jit
def mask_of_the_next_row(seed, edge, o_row, column, COLUMNS: tl.constexpr):
    return kept_tile(seed, edge, o_row + 1, column, COLUMNS)


@triton.jit
def the_first_adapter(F, e, o_r, o_k, stride_r, stride_k, R, K):
    return load_factor(F, e * 0, o_r, o_k, stride_r, stride_k, R, K)


@triton.jit
def rows_of_the_first_segment(
    codes, pairs, absmax, nested_absmax, nested_map, nested_offset, o_row, k, K, BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr,
    BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    args = (codes, pairs, absmax, nested_absmax, nested_map, nested_offset)
    return decoded_tile(*args, o_row % (40 * 64), k, K, BLOCKSIZE, SPAN, BD, BC)


MISTAKES = [
    ("tile_of", rows_in_sorted_order), ("tile_of", the_segment_before), ("tile_of", rows_of_the_next_segment),
    ("kept_tile", dropout_for_all), ("kept_tile", mask_of_the_next_row), ("load_factor", the_first_adapter),
]  # fmt: skip


def broken(of: object) -> bool:
    torch.manual_seed(0)
    return bool(violations(*draw_and_run(of), FP16))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
@pytest.mark.parametrize(("name", "mistake"), MISTAKES, ids=[mistake.__name__ for _, mistake in MISTAKES])
def test_a_mistake_in_a_kernel_is_caught(name: str, mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("adapters", sizes=(5, 4, 6, 1), dtype=FP16, p=0.3)
    assert not broken(of)
    monkeypatch.setattr(segments, name, mistake)
    assert broken(of)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("tile_of", the_segment_before),
        ("tile_of", rows_of_the_next_segment),
        ("decoded_tile", decoded_tile_of_the_next_blocks),
        ("decoded_tile", rows_of_the_first_segment),
    ],
)
def test_a_mistake_in_the_4_bit_product_is_caught(name: str, mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("own in 4 bits", sizes=(5, 4, 6, 1), dtype=FP16, p=0.3)
    assert not broken(of)
    monkeypatch.setattr(segment_nf4_product, name, mistake)
    assert broken(of)


def only_the_first_rows(out, u, W, rows):
    return segments.add_products(out, u, W, rows._replace(offsets=rows.offsets.clone().clamp_(max=3)))


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("add_products", only_the_first_rows),
        ("edge_of", lambda p: segments.KEEP_ALL),
        ("factors_of", lambda *a: grouped_linear_factors(*a)._replace(s=grouped_linear_factors(*a).keep)),
    ],
)
def test_a_mistake_around_the_kernels_is_caught(name: str, mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("own", dtype=FP16, p=0.3)
    assert not broken(of)
    grouped_linear.constant.cache_clear()
    monkeypatch.setattr(grouped_linear, name, mistake)
    assert broken(of)
    grouped_linear.constant.cache_clear()


grouped_linear_factors = grouped_linear.factors_of
