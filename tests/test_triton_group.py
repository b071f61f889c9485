"""lora_linear_group over the Triton kernels: three members a pass, each with its own mask, rank and wanted gradients."""

import itertools

import pytest
import torch
from members_accuracy import check, draw_and_run
from triton_interpreter import DEVICE

from lora_kernels import dropout_mask, use_backend
from lora_kernels.backends.triton import linear
from lora_kernels.backends.triton.kernels import mask
from lora_kernels.backends.triton.kernels.grad_x import grad_x
from lora_kernels.backends.triton.kernels.project import project
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer, ours
from lora_kernels.values import Dropout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QKV = (Layer(33, 4), Layer(10, 12, scaling=0.5), Layer(9, 3, bias=False))
P = 0.3


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def case(**options) -> GroupCase:
    return GroupCase(**{"M": 19, "K": 40, "p": P, "members": QKV, "device": DEVICE, **options})


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("p", [0.0, P])
def test_q_k_v(dtype: torch.dtype, p: float) -> None:
    check(case(p=p, dtype=dtype))


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
def test_adapters_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(case(dtype=dtypes[0], adapter_dtype=dtypes[1], strided=True))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 300), (129, 7), (20, 300)])
def test_sizes(sizes: tuple[int, int]) -> None:
    """K is split where M is small, M where it is large."""
    check(case(M=sizes[0], K=sizes[1], dtype=FP16))


@pytest.mark.parametrize(
    "ranks", [(4, None, 8), (None, 80, 8), (80, 72, None), (None, None, None), (2, 3, 4, 5), (64, 1, 33, 8, 4)]
)
def test_plain_and_wide_and_many_members(ranks: tuple[int | None, ...]) -> None:
    check(case(members=tuple(Layer(20 + i, R) for i, R in enumerate(ranks)), dtype=BF16))


@pytest.mark.parametrize("four_bits", [(0,), (0, 2), (0, 1, 2)])
def test_4_bit_weights(four_bits: tuple[int, ...]) -> None:
    layers = tuple(Layer(20 + i, 4 + i, quant_type="nf4" if i in four_bits else None) for i in range(3))
    check(case(K=64, members=layers, dtype=BF16))


SUBSETS = [names for n in range(1, 5) for names in itertools.combinations(("x", "lora_A", "lora_B", "bias"), n)]


@pytest.mark.parametrize("needs", SUBSETS, ids="+".join)
@pytest.mark.parametrize("frozen", [(), ("q", "v")])
def test_wanted_gradients(needs: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    check(case(M=9, K=16, needs=needs, frozen=frozen))


def test_trained_weights() -> None:
    check(case(needs=("x", "weight", "lora_A"), frozen=("k",)))


@pytest.mark.parametrize("used", [(0,), (2,), (0, 2)])
def test_members_that_are_not_used(used: tuple[int, ...]) -> None:
    """They have no gradients and add nothing to dx."""
    problem = case().draw()
    for i, name in enumerate(list(problem.dys)):
        if i not in used:
            problem.dys.pop(name)
    found = ours(problem)
    assert {name[1] for name in found if "." in name} == {"qkv"[i] for i in used}
    with use_backend("torch"):
        want = ours(problem)
    assert all(torch.allclose(found[name], want[name], atol=1e-4) for name in want)


def test_reruns_are_bit_identical() -> None:
    problem = case(M=129, K=600, dtype=BF16).draw()
    first = ours(problem)
    assert all(torch.equal(t, first[name]) for name, t in ours(problem).items())


# ---- masks ----

OFFSETS = [0, 1, 2, 2**31, 2**32 + 5, 2**64 - 1]


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_mask_of_an_offset(offset: int) -> None:
    seed = torch.tensor(77, device=DEVICE)
    assert torch.equal(mask.mask_bits(9, 40, P, seed, offset), dropout_mask(9, 40, P, seed, offset=offset))


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 2), (3, 1)])
def test_every_member_has_its_own(numbers: tuple[int, ...]) -> None:
    """With identity adapters project returns drop(x) and grad_x undrop(g), of members whose numbers need not be neighbours."""
    M, K, seed = 67, 64, torch.tensor(77, device=DEVICE)
    eye, x = torch.eye(K, device=DEVICE), torch.ones(M, K, device=DEVICE)
    keeps, n = [dropout_mask(M, K, P, seed, offset=4 + i) for i in numbers], len(numbers)
    for h, keep in zip(project(x, (eye,) * n, Dropout(P, seed, 4), numbers), keeps, strict=True):
        assert torch.equal(h != 0, keep)
    dx, dAs = grad_x(x, (x,) * n, (eye,) * n, Dropout(P, seed, 4), FP32, True, (True,) * n, numbers=numbers)
    kept = 1 - round(P * 65536) / 65536
    assert torch.equal((dx * kept).round(), sum(keep.float() for keep in keeps))
    assert all(torch.equal((dA[0] * kept).round(), keep.float().sum(0)) for dA, keep in zip(dAs, keeps, strict=True))


# ---- mistakes ----


def broken(**options) -> bool:
    from lora_kernels.cases.rule import violations

    torch.manual_seed(0)
    return bool(violations(*draw_and_run(case(dtype=FP16, **options)), FP16))


def one_mask_for_all(x, As, dropout, numbers=(0, 1, 2)):
    return project(x, As, dropout, (0,) * len(As))


def dx_of_the_first_two(x, gs, As, dropout, dtype, need_x, need_As, numbers=(0, 1, 2)):
    dx, dAs = grad_x(x, gs[:2], As[:2], dropout, dtype, need_x, need_As[:2], numbers[:2])
    return dx, [*dAs, torch.zeros_like(As[2])]


def members_exchanged(x, gs, As, dropout, dtype, need_x, need_As, numbers=(0, 1, 2)):
    return grad_x(x, gs, As, dropout, dtype, need_x, need_As, (numbers[1], numbers[0], numbers[2]))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="in the interpreter")
@pytest.mark.parametrize(
    ("name", "mutant"), [("project", one_mask_for_all), ("grad_x", dx_of_the_first_two), ("grad_x", members_exchanged)]
)
def test_a_mistake_is_caught(name: str, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not broken()
    monkeypatch.setattr(linear, name, mutant)
    assert broken()
