"""The fused two-segment products, by pointers and by tensor descriptors, against float64."""

import dataclasses

import pytest
import torch
from triton_case import BF16, FP16, FP32, Case, S
from triton_interpreter import DEVICE

from lora_kernels.backends.triton import gemm, tuning


@pytest.fixture(params=["pointer", "tma"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call takes the fused dataflow; on a CPU with small tiles, several per program."""
    if request.param == "tma" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() not in tuning.TMA_GPUS:
        pytest.skip("this GPU has no such kernel")
    monkeypatch.setattr(tuning, "dataflow", lambda a, W, direction: "fused")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tuning, "TMA_GPUS", ((8, 0),) if request.param == "tma" else ())
        for key, tile in tuning.TILES.items():
            if key[0].startswith("fused"):
                monkeypatch.setitem(tuning.TILES, key, dataclasses.replace(tile, rows=32, columns=64, depth=32))
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)])
def test_every_dtype(kind: str, dtype: torch.dtype, adapter: torch.dtype, p: float) -> None:
    case = Case.draw(70, 136, 200, 12, dtype, adapter, p)
    case.check(case.run())


@pytest.mark.parametrize("M", [1, 17, 129])
@pytest.mark.parametrize(("K", "N", "R"), [(8, 8, 1), (72, 264, 24), (33, 65, 64)])
def test_ragged_sizes(kind: str, M: int, K: int, N: int, R: int) -> None:
    case = Case.draw(M, K, N, R, FP16, FP16)
    case.check(case.run())


def test_reruns_are_bit_identical(kind: str) -> None:
    case = Case.draw(70, 136, 200, 12)
    first = case.run(torch.tensor(S, device=DEVICE))
    assert all(torch.equal(tensor, first[name]) for name, tensor in case.run().items())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
def test_broken_products_are_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_triton_mutants import caught, dot_one_percent_small, keep_tile_of_the_next_row

    case = Case.draw(70, 136, 200, 12)
    assert not caught(case)
    for name, mutant in (("dot", dot_one_percent_small), ("keep_tile", keep_tile_of_the_next_row)):
        with monkeypatch.context() as patch:
            patch.setattr(gemm, name, mutant)
            assert "dx" in caught(case), name


def test_tensor_descriptors_need_16_byte_rows() -> None:
    x = torch.empty(8, 64, dtype=FP16)
    assert tuning.tma_legal(x, columns=64)
    assert tuning.tma_legal(x[:, 8:40], columns=64)
    assert not tuning.tma_legal(x, columns=60)
    assert not tuning.tma_legal(x[:, 1:], columns=64)
    assert not tuning.tma_legal(torch.empty(8, 65, dtype=FP16), columns=64)
