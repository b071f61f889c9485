"""What depends on the GPU, as another one would take it: its tiles, and rows in chunks that its L2 holds."""

from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from accuracy import Case, broken_results, check_contract, contract
from triton_interpreter import DEVICE

from lora_kernels import use_backend
from lora_kernels.backends.triton import linear, tuning
from lora_kernels.backends.triton.kernels import grad_x, mask
from lora_kernels.plan import changed

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter pretends to be another GPU")
BF16, FP32 = torch.bfloat16, torch.float32
Pretend = Callable[[tuning.Gpu], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """pretend(gpu): calls by Triton are this GPU's."""

    def become(gpu: tuning.Gpu) -> None:
        monkeypatch.setattr(tuning, "gpu", lambda device: gpu)
        changed()

    with use_backend("triton"):
        yield become
    changed()


@pytest.mark.parametrize("R", [8, 48])
@pytest.mark.parametrize("adapter", [BF16, FP32])
def test_the_tiles_of_sm_90(adapter: torch.dtype, R: int, pretend: Pretend) -> None:
    pretend(tuning.Gpu((9, 0), 4))
    check_contract(Case(M=150, K=600, N=520, R=R, p=0.3, dtype=BF16, adapter_dtype=adapter).draw())


def test_chunks_fill_the_processors_and_half_of_l2() -> None:
    h100, without_l2 = tuning.Gpu((9, 0), 132, l2=50 << 20), tuning.Gpu((9, 0), 132)
    for columns, itemsize, rows in ((4096, 2, 3072), (14336, 2, 896), (1024, 2, 12672), (4096, 4, 1024)):
        assert tuning.chunk_rows(columns, itemsize, h100) == rows
        tiles = rows // 128 * columns // 256
        assert tiles / 132 >= 0.95 * -(-tiles // 132)
        assert rows * columns * itemsize <= 25 << 20
    assert tuning.chunk_rows(28672, 2, h100) == 1 << 31  # one, two or three rows of tiles: 0.85 of a round each
    assert tuning.chunk_rows(4096, 2, without_l2) == 1 << 31


CHUNKED = Case(M=1100, K=40, N=48, R=8, p=0.3, dtype=BF16)
FOUR_TILES = tuning.Gpu((8, 0), 4, l2=2 * 4 * 128 * 48 * 2)  # half of it holds four tiles of 128 rows, a round


@pytest.mark.parametrize("needs", [("x", "A", "B"), ("x",), ("A",)])
@pytest.mark.parametrize("adapter", [BF16, FP32])
def test_rows_in_chunks(adapter: torch.dtype, needs: tuple[str, ...], pretend: Pretend, monkeypatch) -> None:
    pretend(FOUR_TILES)
    added, add = [], linear.add_product
    monkeypatch.setattr(linear, "add_product", lambda out, *rest: added.append(len(out)) or add(out, *rest))
    problem = Case(**{**vars(CHUNKED), "adapter_dtype": adapter, "needs": needs}).draw()
    check_contract(problem)
    assert added == [512, 512, 76] * (1 + ("x" in needs))
    first = contract(problem)
    assert all(torch.equal(tensor, first[name]) for name, tensor in contract(problem).items())


@triton.jit
def keep_tile_of_the_first_chunk(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    return right_keep_tile(seed, edge, o_row % 512, column, OFFSET, COLUMNS)


right_keep_tile = mask.keep_tile


def test_a_mask_that_begins_anew_in_each_chunk_is_caught(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(FOUR_TILES)
    problem = CHUNKED.draw()
    assert not broken_results(problem, contract(problem))
    monkeypatch.setattr(grad_x, "keep_tile", keep_tile_of_the_first_chunk)
    assert {"dx", "dA"} <= set(broken_results(problem, contract(problem)))
