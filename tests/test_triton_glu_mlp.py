"""lora_glu_mlp over the Triton kernels: every activation, form, dtype and set of wanted gradients; mistakes that are caught."""

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
import triton
import triton.language as tl
from members_accuracy import check, draw_and_run
from triton_interpreter import DEVICE

from lora_kernels import dropout_mask, use_backend
from lora_kernels.backends.triton import glu_mlp
from lora_kernels.backends.triton.kernels import glu, glu_backward
from lora_kernels.cases.glu_mlp import DOWN, GATE, UP, Case
from lora_kernels.cases.members import ours
from lora_kernels.cases.rule import violations
from lora_kernels.values import ACTIVATIONS, Dropout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LAYERS = {"gate": GATE, "up": UP, "down": DOWN}
P = 0.3


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def case(**options) -> Case:
    return Case(**{"M": 19, "K": 24, "I": 70, "N": 21, "p": P, "device": DEVICE, **options})


every_form = pytest.mark.parametrize("form", [{}, {"gate": None}], ids=["gated", "plain"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@every_form
def test_activations(activation: str, dtype: torch.dtype, form: dict) -> None:
    check(case(activation=activation, dtype=dtype, **form))


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP16, FP32), (FP16, FP16), (FP32, BF16)])
@pytest.mark.parametrize("p", [0.0, P])
def test_adapters_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], p: float) -> None:
    check(case(dtype=dtypes[0], adapter_dtype=dtypes[1], p=p, strided=True))


@pytest.mark.parametrize("sizes", [(1, 24, 40, 21), (3, 1, 1, 2), (129, 7, 131, 5), (1, 5, 600, 3)])
@every_form
def test_sizes(sizes: tuple[int, int, int, int], form: dict) -> None:
    """I is split where M is small, M where it is large."""
    M, K, I, N = sizes  # noqa: E741
    check(case(M=M, K=K, I=I, N=N, dtype=FP16, **form))


@pytest.mark.parametrize("M", [(0,), (2, 0), (2, 3)])
def test_shapes(M: tuple[int, ...]) -> None:
    check(case(M=M))


WITHOUT = [names for n in range(1, 4) for names in itertools.combinations(LAYERS, n)]


@pytest.mark.parametrize("names", WITHOUT)
@pytest.mark.parametrize("change", [{"R": None}, {"R": 72}, {"quant_type": "nf4"}], ids=str)
def test_plain_and_wide_and_4_bit_members(names: tuple[str, ...], change: dict) -> None:
    check(case(K=64, I=64, dtype=BF16, **{name: replace(LAYERS[name], **change) for name in names}))


NEEDS = [names for n in range(1, 4) for names in itertools.combinations(("x", "lora_A", "lora_B", "bias"), n)]


@pytest.mark.parametrize("needs", NEEDS, ids="+".join)
@pytest.mark.parametrize("options", [{}, {"gate": None}, {"frozen": ("gate", "up")}, {"frozen": ("down", "gate")}], ids=str)
def test_wanted_gradients(needs: tuple[str, ...], options: dict) -> None:
    check(case(M=9, K=16, I=24, N=10, needs=needs, **options))


def test_trained_weights() -> None:
    check(case(needs=("x", "weight", "lora_A")))


def test_reruns_are_bit_identical() -> None:
    """Of both passes twice, and of the backward pass of one graph: nothing that is saved is written to."""
    problem = case(M=70, I=140, dtype=BF16).draw()
    first = ours(problem)
    assert all(torch.equal(t, first[name]) for name, t in ours(problem).items())
    (y,), leaves = problem.case.call(problem.x, problem.members), list(problem.leaves.values())
    pairs = [torch.autograd.grad(y, leaves, problem.dys["y"], retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_the_kernels_have_the_mask_of_their_member() -> None:
    """With identity adapters glu returns drop(a), and dA is the column sums of drop(a) where g is one."""
    M, D, seed = 37, 64, torch.tensor(5, device=DEVICE)
    eye, u, dropout = torch.eye(D, device=DEVICE), torch.ones(M, D, device=DEVICE), Dropout(P, seed, 2)
    keep = dropout_mask(M, D, P, seed, offset=2)
    a, h = glu.glu(None, u, eye, dropout, "relu2")
    assert torch.equal(a, u)
    assert torch.equal(h != 0, keep)
    down, up = glu_backward.Down(u, eye, dropout, True), glu_backward.NOTHING._replace(needed=True)
    found = glu_backward.glu_backward(torch.zeros_like(u), None, u, down, glu_backward.NOTHING, up, "relu2")
    kept = 1 - round(P * 65536) / 65536
    assert torch.equal((found.dA[0] * kept).round(), keep.float().sum(0))
    assert torch.equal(found.du != 0, keep)


# ---- mistakes ----


@triton.jit
def constant_slope(v, gate, act, ACT: tl.constexpr):
    return gate


@triton.jit
def act_of_the_other(e, u, ACT: tl.constexpr):
    return right_gated(u, e, ACT)


@triton.jit
def keep_tile_of_the_next_row(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    return right_keep_tile(seed, edge, o_row + 1, column, OFFSET, COLUMNS)


@triton.jit
def keep_tile_of_the_member_before(seed, edge, o_row, column, OFFSET: tl.constexpr, COLUMNS: tl.constexpr):
    return right_keep_tile(seed, edge, o_row, column, OFFSET - 1, COLUMNS)


right_gated, right_keep_tile, right = glu.gated, glu_backward.keep_tile, glu_backward.glu_backward


def without_the_low_rank_part(da, e, u, down, *rest):
    return right(da, e, u, down._replace(A=torch.zeros_like(down.A)), *rest)


def gradient_of_an_undropped_a(da, e, u, down, *rest):
    found = right(da.clone(), e, u, down._replace(dropout=None), *rest)
    return right(da, e, u, down, *rest)._replace(dA=found.dA)


def gate_and_up_exchanged(da, e, u, down, gate, up, activation):
    return right(da, e, u, down, gate._replace(h=up.h), up._replace(h=gate.h), activation)


MUTANTS = [
    (glu, "gated", act_of_the_other),
    (glu_backward, "slope_of", constant_slope),
    (glu_backward, "keep_tile", keep_tile_of_the_next_row),
    (glu_backward, "keep_tile", keep_tile_of_the_member_before),
    (glu_mlp, "glu_backward", without_the_low_rank_part),
    (glu_mlp, "glu_backward", gradient_of_an_undropped_a),
    (glu_mlp, "glu_backward", gate_and_up_exchanged),
    (glu_mlp, "following", lambda dropout, number: dropout),
]


def broken() -> bool:
    """Of gate and up of one rank, so that a mistake can exchange them."""
    layers = {name: replace(layer, R=4) for name, layer in LAYERS.items()}
    torch.manual_seed(0)
    return bool(violations(*draw_and_run(case(M=40, dtype=FP16, **layers)), FP16))


@cache
def right_is_not_broken() -> bool:
    return not broken()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are replaced in the interpreter")
@pytest.mark.parametrize(("module", "name", "mutant"), MUTANTS)
def test_a_mistake_is_caught(module, name: str, mutant: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert right_is_not_broken()
    monkeypatch.setattr(module, name, mutant)
    assert broken()
