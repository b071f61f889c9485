"""Segments, and what of them and of the other arguments does not fit lora_grouped_linear and multi_lora_linear."""

import pytest
import torch

from lora_kernels import LoRAAdapter, Segments, lora_grouped_linear, multi_lora_linear, quantize_nf4

IDS = [2, 0, -1, 2, 0, 0, 3, -1, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", [IDS, [], [-1, -1], [4], [1, 1, 1]])
def test_rows_are_sorted_by_segment(ids, dtype, device):
    """Those of one in the order in which they were, those of none last."""
    segments = Segments.from_ids(torch.tensor(ids, dtype=dtype, device=device), 5)
    rows = [[i for i, of in enumerate(ids) if of == e] for e in (*range(5), -1)]
    assert segments.order.tolist() == [i for own in rows for i in own]
    assert segments.offsets.tolist() == [sum(map(len, rows[:e])) for e in range(6)]
    assert segments.offsets.dtype == torch.int32
    assert segments.order[segments.inverse].tolist() == list(range(len(ids)))
    assert segments.inverse[segments.order].tolist() == list(range(len(ids)))
    assert (segments.number, segments.rows) == (5, len(ids))


def test_ids_of_any_shape_are_rows_in_order():
    flat = Segments.from_ids(torch.tensor(IDS), 4)
    assert all(torch.equal(a, b) for a, b in zip(flat, Segments.from_ids(torch.tensor(IDS).view(3, 3), 4), strict=True))


def test_the_host_keeps_what_it_knows():
    segments = Segments.from_ids(torch.tensor(IDS), 4)
    assert segments.host is segments.offsets
    moved = segments.to("meta")
    assert (moved.order.device.type, moved.host) == ("meta", segments.host)
    assert Segments.from_ids(torch.tensor(IDS).to("meta"), 4).host is None
    assert segments.read() is segments
    assert torch.equal(segments._replace(host=None).read().host, segments.offsets)


def test_elsewhere_an_id_outside_is_one_of_none():
    """Where no host looks, as in a graph: nothing reads beyond the adapters."""
    made = torch.compile(lambda ids: Segments.from_ids(ids, 2), backend="eager", fullgraph=True)
    assert made(torch.tensor([7, 0, -5, 1])).offsets.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0, 1], 2), TypeError, "ids: got list, expected a torch.int32 or int64 tensor; use torch.as_tensor"),
        ((torch.zeros(3), 2), TypeError, "ids: got torch.float32"),
        ((torch.tensor([0, 2]), 2), ValueError, "ids: got 2, expected -1 for none, or 0 to 1"),
        ((torch.tensor([0, -2]), 2), ValueError, "ids: got -2"),
        ((torch.tensor([-1]), 0), ValueError, "count: got 0, expected an int of at least 1"),
        ((torch.tensor([0]), 1.0), ValueError, "count: got 1.0"),
    ],
)
def test_ids_that_do_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        Segments.from_ids(*arguments)


SEGMENTS = Segments.from_ids(torch.tensor([0, 0, 1, 2, -1]), 3)
X, W, A, B = torch.ones(5, 4), torch.ones(3, 6, 4), torch.ones(3, 2, 4), torch.ones(3, 6, 2)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": "x"}, TypeError, "x: got str, expected a torch.Tensor"),
        ({"x": torch.ones(4, 4)}, ValueError, r"segments: got 5 rows, expected 4 for x \(4, 4\); use Segments.from_ids"),
        ({"x": torch.ones(5, 1, 4)}, ValueError, r"x: got shape \(5, 1, 4\), expected \[M, K\], sorted .*; use x.flatten"),
        ({"x": torch.ones(5, 3)}, ValueError, r"x: got shape \(5, 3\), expected \[M, 4\] for weight \(3, 6, 4\)"),
        ({"x": X.double()}, TypeError, "x: got dtype torch.float64, expected torch.float32 as weight; use x.to"),
        ({"segments": torch.zeros(5)}, TypeError, "segments: got Tensor, expected Segments; use Segments.from_ids"),
        ({"segments": SEGMENTS.to("meta")}, ValueError, "segments: got offsets on meta, expected cpu as x; use segments.to"),
        ({"weight": W[:2]}, ValueError, r"weight: got shape \(2, 6, 4\), expected \[3, N, K\], or \[N, K\]"),
        ({"lora_A": A[0]}, ValueError, r"lora_A: got shape \(2, 4\), expected \[3, R, 4\] for weight \(3, 6, 4\)"),
        ({"lora_A": A[:, :0]}, ValueError, r"lora_A: got rank 0 \(shape \(3, 0, 4\)\), expected at least 1"),
        ({"lora_B": B.mT}, ValueError, r"lora_B: got shape \(3, 2, 6\), expected \[3, 6, 2\] .*; use lora_B.mT"),
        ({"lora_B": None}, TypeError, "lora_B: got None, expected a torch.Tensor"),
        ({"lora_B": B.half()}, TypeError, "lora_B: got dtype torch.float16, expected torch.float32 as lora_A"),
        ({"bias": torch.ones(3)}, ValueError, r"bias: got shape \(3,\), expected \[3, 6\], or \[6\] for all segments"),
        ({"scaling": "1"}, TypeError, "scaling: got str"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p: got 2.0"),
        ({"dropout_p": 0.5, "seed": 0.5}, TypeError, "seed: got float"),
        (
            {"weight": quantize_nf4(torch.ones(3, 6, 4), blocksize=32)},
            ValueError,
            "weight: got blocks of 32 over segments of 6·4 elements, expected blocks that end with them; use a blocksize",
        ),
    ],
)
def test_stacks_that_do_not_fit(changes, error, words):
    state = torch.get_rng_state()
    arguments = {"x": X, "weight": W, "lora_A": A, "lora_B": B, "segments": SEGMENTS, **changes}
    with pytest.raises(error, match=words):
        lora_grouped_linear(**arguments)
    assert torch.equal(torch.get_rng_state(), state), "a refused call drew a seed"


OWN = LoRAAdapter(A[0], B[0])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"adapters": []}, ValueError, "adapters: got 0, expected 3, one for each of the segments; use Segments.from_ids"),
        ({"adapters": [OWN, OWN, (A, B)]}, TypeError, r"adapters\[2\]: got tuple, expected LoRAAdapter"),
        ({"adapters": [OWN, OWN._replace(lora_A=None), OWN]}, TypeError, r"adapters\[1\].lora_A: got None.* use the id -1"),
        ({"adapters": [OWN, OWN._replace(lora_B=None), OWN]}, TypeError, r"adapters\[1\].lora_B: got NoneType"),
        (
            {"adapters": [OWN, OWN._replace(lora_B=B[0].T), OWN]},
            ValueError,
            r"adapters\[1\].lora_B: .*use adapters\[1\].lora_B.T",
        ),
        (
            {"adapters": [OWN, OWN, LoRAAdapter(A[0].half(), B[0].half())]},
            TypeError,
            r"adapters\[2\].lora_A: .* as adapters\[0\]",
        ),
        ({"adapters": [OWN, OWN._replace(scaling="1"), OWN]}, TypeError, r"adapters\[1\].scaling: got str"),
        ({"adapters": [OWN, OWN._replace(dropout_p="1"), OWN]}, TypeError, r"adapters\[1\].dropout_p: got str"),
        ({"adapters": [OWN, OWN._replace(dropout_p=-0.5), OWN]}, ValueError, r"adapters\[1\].dropout_p: got -0.5"),
        ({"adapters": [OWN, OWN, OWN._replace(dropout_p=1.5)]}, ValueError, r"adapters\[2\].dropout_p: got 1.5"),
        ({"weight": W}, ValueError, r"weight: got shape \(3, 6, 4\), expected two dimensions"),
        ({"bias": torch.ones(3, 6)}, ValueError, r"bias: got shape \(3, 6\), expected \(6,\)"),
        ({"x": torch.ones(2, 2, 4)}, ValueError, "segments: got 5 rows, expected 4"),
    ],
)
def test_lists_that_do_not_fit(changes, error, words):
    with pytest.raises(error, match=words):
        multi_lora_linear(**{"x": X, "weight": W[0], "adapters": [OWN] * 3, "segments": SEGMENTS, **changes})


def test_every_call_is_checked_for_its_own_rows():
    """A call of 5 rows prepares one of 6: both are in the range up to 8."""
    lora_grouped_linear(X, W, A, B, SEGMENTS)
    with pytest.raises(ValueError, match="segments: got 5 rows, expected 6"):
        lora_grouped_linear(torch.ones(6, 4), W, A, B, SEGMENTS)
