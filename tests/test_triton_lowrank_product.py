"""The product and its low-rank term in one kernel, by pointers and by tensor descriptors, against float64."""

import dataclasses

import pytest
import torch
from accuracy import Case, broken_results, check_contract, contract
from kinds import DTYPES
from triton_interpreter import DEVICE

from lora_kernels import use_backend
from lora_kernels.backends.triton import linear, tuning
from lora_kernels.backends.triton.kernels import lowrank_product
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer, ours, plain, truth
from lora_kernels.cases.rule import violations

BF16, FP16, FP32, _ = DTYPES
CASE = Case(M=70, K=136, N=200, R=12, p=0.3, dtype=FP16, device=DEVICE)


@pytest.fixture(params=["pointer", "tma"], autouse=True)
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every call takes this dataflow; on a CPU with small tiles, several per program."""
    if request.param == "tma" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() not in tuning.TMA_GPUS:
        pytest.skip("this GPU has no such kernel")
    monkeypatch.setattr(linear.tuning, "dataflow", lambda a, W, direction: "lowrank_product")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(tuning, "TMA_GPUS", ((8, 0),) if request.param == "tma" else ())
        for key, tile in tuning.TILES.items():
            if key[0].startswith("lowrank_product"):
                monkeypatch.setitem(tuning.TILES, key, dataclasses.replace(tile, rows=32, columns=64, depth=32))
    called = []
    for name in ("forward", "backward"):
        function = getattr(lowrank_product, name)
        monkeypatch.setattr(lowrank_product, name, lambda *args, f=function, n=name: called.append(n) or f(*args))
    with use_backend("triton"):
        yield request.param
    assert request.node.name.startswith("test_tensor_descriptors") or set(called) == {"forward", "backward"}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)])
def test_every_dtype(dtype: torch.dtype, adapter: torch.dtype, p: float) -> None:
    check_contract(dataclasses.replace(CASE, dtype=dtype, adapter_dtype=adapter, p=p).draw())


@pytest.mark.parametrize("M", [1, 17, 129])
@pytest.mark.parametrize(("K", "N", "R"), [(8, 8, 1), (72, 264, 24), (33, 65, 64)])
def test_ragged_sizes(M: int, K: int, N: int, R: int) -> None:
    check_contract(dataclasses.replace(CASE, M=M, K=K, N=N, R=R).draw())


def test_reruns_are_bit_identical() -> None:
    problem = dataclasses.replace(CASE, scaling=torch.tensor(1.7, device=DEVICE)).draw()
    first = contract(problem)
    assert all(torch.equal(tensor, first[name]) for name, tensor in contract(problem).items())


def test_dx_of_a_group_s_only_result_that_is_used_has_its_member_s_mask() -> None:
    """The second member's: alone it is in one kernel, under its own number."""
    problem = GroupCase(M=19, K=40, p=0.3, dtype=FP16, members=(Layer(8, 4), Layer(16, 4)), device=DEVICE).draw()
    problem.dys.pop(next(iter(problem.dys)))
    assert not violations({"dx": ours(problem)["dx"]}, {"dx": plain(problem)["dx"]}, {"dx": truth(problem)["dx"]}, FP16)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
def test_broken_products_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from test_triton_mutants import dot_one_percent_small, keep_tile_of_the_next_row

    problem = CASE.draw()
    assert not broken_results(problem, contract(problem))
    for name, mutant in (("dot", dot_one_percent_small), ("keep_tile", keep_tile_of_the_next_row)):
        with monkeypatch.context() as patch:
            patch.setattr(lowrank_product, name, mutant)
            assert "dx" in broken_results(problem, contract(problem)), name


def test_tensor_descriptors_need_16_byte_rows() -> None:
    x = torch.empty(8, 64, dtype=FP16)
    assert tuning.tma_legal(x, columns=64)
    assert tuning.tma_legal(x[:, 8:40], columns=64)
    assert not tuning.tma_legal(x, columns=60)
    assert not tuning.tma_legal(x[:, 1:], columns=64)
    assert not tuning.tma_legal(torch.empty(8, 65, dtype=FP16), columns=64)
