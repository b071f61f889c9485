"""Mistakes in PyTorch's backend of lora_grouped_linear and multi_lora_linear, by field, that the rule must catch."""

from dataclasses import replace

import pytest
import torch
from segments_accuracy import FORMS

from lora_kernels import use_backend
from lora_kernels.backends.torch import grouped_linear, segments
from lora_kernels.backends.torch.engine import ChunkMask
from lora_kernels.cases.members import ours, plain, truth
from lora_kernels.cases.rule import violations


def of_segments(change):
    """A mistake in what is known of each segment: change(segment, all of them) -> segment."""

    def mutate(monkeypatch, original=grouped_linear.segments):
        def changed(*arguments):
            found = list(original(*arguments))
            yield from [change(segment, found) for segment in found]

        monkeypatch.setattr(grouped_linear, "segments", changed)

    return mutate


def with_own(**changes):
    return of_segments(
        lambda s, found: s._replace(own=s.own._replace(**{n: change(s, found) for n, change in changes.items()}))
    )


def swapped(field):
    """Of the other segment of the same shape."""
    return with_own(**{field: lambda s, found: getattr(found[-1 if s is found[0] else 0].own, field)})


def a_mask_of_each_segment_from_row_0(monkeypatch):
    class FromZero(ChunkMask):
        def chunk(self, rows):
            count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
            super().chunk(slice(0, count))

    monkeypatch.setattr(grouped_linear, "ChunkMask", FromZero)


def a_mask_by_sorted_rows(monkeypatch):
    """Whose row is the place after sorting, not the row of x."""

    class Sorted(ChunkMask):
        def chunk(self, rows):
            super().chunk(torch.argsort(torch.argsort(rows)) if isinstance(rows, torch.Tensor) else rows)

    monkeypatch.setattr(grouped_linear, "ChunkMask", Sorted)


def a_scale_of_no_dropout(monkeypatch):
    monkeypatch.setattr(grouped_linear, "keep_scale", lambda p: 1.0)


def gradients_of_the_next_segment(monkeypatch, original=grouped_linear.into):
    def into(found, grads, members, segment):
        original(found, grads, members, segment._replace(number=segment.number ^ 1))

    monkeypatch.setattr(grouped_linear, "into", into)


def rows_where_the_block_begins(monkeypatch, original=grouped_linear.blocks):
    """Of x and dy: a piece begins where its block does."""

    def blocks(*arguments):
        for block in original(*arguments):
            pieces = [piece._replace(within=slice(0, piece.within.stop - piece.within.start)) for piece in block.pieces]
            yield block._replace(pieces=pieces)

    monkeypatch.setattr(grouped_linear, "blocks", blocks)


def no_last_row(monkeypatch):
    change = of_segments(lambda s, found: s._replace(place=slice(s.place.start, max(s.place.start, s.place.stop - 1))))
    change(monkeypatch)


def rows_of_none_are_the_last_segments(monkeypatch, original=grouped_linear.ends):
    monkeypatch.setattr(grouped_linear, "ends", lambda rows, M: [*original(rows, M)[:-1], M])


def the_last_block_alone(monkeypatch):
    """Of the gradients of a segment that lies in several."""
    monkeypatch.setattr(grouped_linear, "total", lambda sum_so_far, part: part)


def rows_in_the_order_of_x(monkeypatch):
    """Unsorted: which rows stand at a place is forgotten."""
    monkeypatch.setattr(grouped_linear, "numbers", lambda order, place: place)


MISTAKES = {
    "masks from row 0": (("own", "shared", "adapters"), a_mask_of_each_segment_from_row_0),
    "masks by sorted rows": (("adapters",), a_mask_by_sorted_rows),
    "no scale of dropout": (("own", "shared", "adapters"), a_scale_of_no_dropout),
    "dropout of all segments is the first's": (
        ("adapters",),
        of_segments(lambda s, found: s._replace(p=found[0].p)),
    ),
    "A of another": (("own", "shared", "adapters"), swapped("lora_A")),
    "B of another": (("own", "shared", "adapters"), swapped("lora_B")),
    "W of another": (("own",), swapped("weight")),
    "c of another": (("own",), swapped("bias")),
    "s of another": (("adapters",), swapped("scaling")),
    "gradients of the next": (("own", "shared", "adapters"), gradients_of_the_next_segment),
    "rows from where the block begins": (("own", "shared"), rows_where_the_block_begins),
    "the last row left out": (("own", "shared", "adapters"), no_last_row),
    "rows of none are the last's": (("own", "shared", "adapters"), rows_of_none_are_the_last_segments),
    "the last block alone": (("own", "shared", "adapters"), the_last_block_alone),
    "the order forgotten": (("adapters",), rows_in_the_order_of_x),
}


@pytest.fixture(autouse=True)
def _blocks_of_few_rows(monkeypatch):
    monkeypatch.setattr(grouped_linear, "row_chunks", lambda M, width, device: [slice(0, 7)])
    with use_backend("torch"):
        yield


def case_of(form, **options):
    """Segments 0 and 1 of one shape, and some rows of none."""
    case, own = FORMS[form]
    adapters = {"ranks": (4, 4), "scalings": (2.0, 0.5)} if form == "adapters" else {}
    return case(M=40, sizes=(17, 15), p=0.4, **{**own, **adapters, **options})


@pytest.mark.parametrize(("form", "name"), [(form, name) for name, (forms, _) in MISTAKES.items() for form in forms])
def test_a_mistake_is_caught(form, name, monkeypatch):
    case = case_of(form)
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    assert not violations(ours(problem), expected, exact, case.dtype)
    MISTAKES[name][1](monkeypatch)
    assert violations(ours(problem), expected, exact, case.dtype)


def test_codes_or_scales_of_another_segment_are_caught(monkeypatch):
    original, case = segments.weight_of, replace(case_of("own"), K=64, N=40, quant_type="nf4")
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    assert not violations(ours(problem), expected, exact, case.dtype)
    for field in ("codes", "absmax"):
        monkeypatch.setattr(
            segments, "weight_of", lambda W, e, f=field: original(W, e).with_tensors(**{f: getattr(original(W, 0), f)})
        )
        assert violations(ours(problem), expected, exact, case.dtype), field


def test_one_row_of_uninitialised_memory_is_caught(monkeypatch):
    """Of dx in rows of none, where nothing but a zero is written."""
    case = case_of("own")
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    monkeypatch.setattr(grouped_linear, "numbers", lambda order, place: slice(0, 0) if place.start == 32 else place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda t, *size, **options: t.new_full(size, float("nan"), **options))
        broken = violations(ours(problem), expected, exact, case.dtype)
    assert {line.partition(":")[0] for line in broken} == {"y", "dx"}
