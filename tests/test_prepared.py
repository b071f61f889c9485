"""What is kept of a kind of call: a call of another kind never gets it, whatever differs, and little is kept."""

from dataclasses import replace

import pytest
import torch
from accuracy import Case, check, ours

from lora_kernels import lora_linear, plan, quantize_nf4, use_backend
from lora_kernels.operation import prepared
from lora_kernels.operation.prepared import _kinds
from lora_kernels.values import LoRAWeights

ONE = Case(M=6, K=64, N=48, R=4, p=0.25, scaling=0.5)
OTHERS = {
    "rows": replace(ONE, M=70),
    "one row": replace(ONE, M=1),
    "no rows": replace(ONE, M=0),
    "three dimensions": replace(ONE, M=(2, 3)),
    "strided": replace(ONE, strided=True),
    "columns": replace(ONE, K=40),
    "rank": replace(ONE, R=3),
    "dtype": replace(ONE, dtype=torch.bfloat16),
    "adapters' dtype": replace(ONE, dtype=torch.bfloat16, adapter_dtype=torch.float32),
    "no dropout": replace(ONE, p=0.0),
    "other dropout": replace(ONE, p=0.5),
    "everything dropped": replace(ONE, p=1.0),
    "no bias": replace(ONE, bias=False),
    "scaling of one": replace(ONE, scaling=1.0),
    "scaling as a tensor": replace(ONE, scaling=torch.tensor(0.5)),
    "4 bits": replace(ONE, quant_type="nf4", base_dtype=torch.float32),
    "autocast": replace(ONE, autocast=torch.bfloat16),
    **{
        f"gradients {needs or None}": replace(ONE, needs=tuple(needs))
        for needs in ("", "x", "A", "AB", "xAB", "xWABc", "W", "c")
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_call_of_another_kind_gets_its_own(name):
    """In both orders: what the first call left is there when the second comes."""
    for cases in ((ONE, OTHERS[name]), (OTHERS[name], ONE)):
        _kinds.clear()
        for case in cases:
            check(case)


def test_a_range_of_rows_is_one_kind():
    """Packing changes M at every step; up to 2^20 rows there are 21 ranges."""
    for M in range(513, 600):
        ours(replace(ONE, M=M).draw())
    assert len(_kinds) == 1
    ours(replace(ONE, M=(3, 200)).draw())
    assert len(_kinds) == 1


def test_a_range_of_numbers_is_one_kind():
    """A scaling that is warmed up makes no new kind at each step."""
    for step in range(2, 9):
        ours(replace(ONE, scaling=step / 10).draw())
    assert len(_kinds) == 1


def test_kinds_are_bounded(monkeypatch):
    monkeypatch.setattr(prepared, "LIMIT", 3)
    for K in range(1, 9):
        check(replace(ONE, K=K))
        assert len(_kinds) <= 3


def test_nothing_of_a_call_is_kept():
    """No tensor lives on in a kind."""
    problem = ONE.draw()
    ours(problem)
    seen, left = set(), list(_kinds.items())
    while left:
        value = left.pop()
        assert not isinstance(value, (torch.Tensor, LoRAWeights))
        if isinstance(value, prepared.Prepared):
            left += [getattr(value, name) for name in value.__slots__]
        elif isinstance(value, (tuple, list)) and id(value) not in seen:
            seen.add(id(value))
            left += value


def test_the_setting_and_the_backends_state_make_other_kinds():
    problem = ONE.draw()
    ours(problem)
    with use_backend("torch"):
        ours(problem)
    plan.changed()
    ours(problem)
    assert len(_kinds) == 3


def test_calls_that_do_not_fit_are_refused_each_time():
    """After a call of the same layouts that fits, and without a trace."""
    x, W, A, B = (torch.ones(*shape) for shape in ((5, 64), (48, 64), (4, 64), (48, 4)))
    lora_linear(x, W, A, B)
    kinds = len(_kinds)
    for _ in range(2):
        for bad, words in (
            ((x.double(), W, A, B), "x: got dtype torch.float64"),
            ((x, W, A.half(), B), "lora_B: got dtype torch.float32, expected torch.float16"),
            ((x, W, A.T, B), "lora_A: got shape"),
            ((x[0, 0], W, A, B), "x: got shape"),
            ((x.tolist(), W, A, B), "x: got list"),
            ((x, None, A, B), "weight: got NoneType"),
            ((x.to("meta"), W, A, B), "lora_A: got a tensor on cpu, expected meta"),
            ((x, quantize_nf4(torch.ones(48, 32)), A, B), "lora_A: got shape"),
        ):
            with pytest.raises((TypeError, ValueError), match=words):
                lora_linear(*bad)
        for p in (-0.1, 1.5, float("nan"), "0.1", [0.1], True):
            with pytest.raises((TypeError, ValueError), match="dropout_p: got"):
                lora_linear(x, W, A, B, dropout_p=p)
    assert len(_kinds) == kinds
