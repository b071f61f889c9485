"""Rows by segment as PyTorch's operations take them: what is whose, and blocks of sorted rows that stay in a CPU's cache."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from ...nf4 import NF4Weight
from ...values import LoRAWeights, Rows
from .nf4 import block_absmax

Members = tuple[LoRAWeights, ...]


class Segment(NamedTuple):
    """A segment with rows: its number, its place among the sorted rows, its own projection, whose weight is None if shared."""

    number: int
    place: slice
    own: LoRAWeights
    p: float


class Piece(NamedTuple):
    """Rows of one segment in a block: their place among the sorted rows, and in the block."""

    segment: Segment
    place: slice
    within: slice


class Block(NamedTuple):
    """Consecutive sorted rows with one p."""

    place: slice
    pieces: list[Piece]

    @property
    def p(self) -> float:
        return self.pieces[0].segment.p


def ends(rows: Rows, M: int) -> list[int]:
    """The offsets as numbers. On the meta device, which has none, all M rows are in segment 0: shapes depend on no number."""
    if rows.offsets.is_meta:
        return [0, *[M] * (len(rows.offsets) - 1)]
    return (rows.offsets if rows.host is None else rows.host).tolist()


def places(bounds: list[int]) -> list[tuple[int, slice]]:
    """(e, its place among the sorted rows) of the segments with rows."""
    return [(e, slice(start, stop)) for e, (start, stop) in enumerate(itertools.pairwise(bounds)) if start < stop]


def segments(members: Members, p: float, ps: tuple[float, ...], bounds: list[int]) -> Iterator[Segment]:
    """Those with rows; of a stack a view of what is theirs. A bias that is shared is in each."""
    W, A, B, c, s, _ = members[0]
    for e, place in places(bounds):
        if len(members) > 1:
            own = members[e + 1]._replace(bias=c)
        else:
            weight = weight_of(W, e) if W is not None and len(W.shape) == 3 else None
            bias = c if c is None or c.ndim == 1 else c[e]
            own = LoRAWeights(weight, None if A is None else A[e], None if B is None else B[e], bias, s)
        yield Segment(e, place, own, ps[e] if ps else p)


def weight_of(W: Tensor | NF4Weight, e: int) -> Tensor | NF4Weight:
    """W[e]; of a 4-bit stack the segment's codes, and its blocks' absmax in float32: an eighth of the codes' bytes."""
    if isinstance(W, Tensor):
        return W[e]
    size, shape = W.shape[1:].numel(), W.shape[1:]
    absmax = block_absmax(W, e * size // W.blocksize, (e + 1) * size // W.blocksize)
    codes = W.codes[e * size // 2 : (e + 1) * size // 2]
    return NF4Weight(codes, absmax, None, None, None, shape, W.dtype, W.blocksize, W.quant_type)


def blocks(found: Iterable[Segment], most: int) -> Iterator[Block]:
    """The segments' rows in blocks of at most `most`, which are gathered and written once: an index of rows takes 30 µs, as
    long as all else that is done for a segment of few.
    """
    pieces: list[Piece] = []
    begin = 0
    for segment in found:
        at = segment.place.start
        while at < segment.place.stop:
            if pieces and (at - begin == most or segment.p != pieces[0].segment.p):
                yield Block(slice(begin, at), pieces)
                pieces = []
            begin = begin if pieces else at
            end = min(segment.place.stop, begin + most)
            pieces.append(Piece(segment, slice(at, end), slice(at - begin, end - begin)))
            at = end
    if pieces:
        yield Block(slice(begin, pieces[-1].place.stop), pieces)


def numbers(order: Tensor | None, place: slice) -> slice | Tensor:
    """Which rows of x stand there."""
    return place if order is None else order[place]
