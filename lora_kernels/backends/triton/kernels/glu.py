"""a = act(e)·u, or act(u), and equation 1 over it: down's h, in the same pass."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import keep_scale
from ....values import Dropout
from .. import tuning
from ..launch import call, two
from ..tuning import Tile
from .activation import gated
from .mask import edge
from .members import words
from .project import add_projection
from .sums import new_parts, sum_parts
from .tiles import load_tile, store_tile


@triton.jit(do_not_specialize=["M", "edge"])
def glu_kernel(
    e, u, a, A, parts, seed, edge, keep_scale, M, D, part_columns,
    ACT: tl.constexpr, DROP: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr, OF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """a = act(e)·u, h = drop(a)·Aᵀ: parts[i_n, M, R] of one range of columns each; a program owns BM rows of one range.

    e may be None: a = act(u); A and parts: only a is computed. e and u are each one of OF parts of rows of OF·D columns.
    """
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    acc = tl.zeros([BM, BR], tl.float32)
    if DROP:
        seed = tl.load(seed)
    for n in range(i_n * part_columns, tl.minimum(D, (i_n + 1) * part_columns), BN):
        o_n = n + tl.arange(0, BN)
        b_e = None
        if e is not None:
            b_e = load_tile(e, o_m, o_n, D * OF, M, D)
        b_a = gated(b_e, load_tile(u, o_m, o_n, D * OF, M, D), ACT).to(a.dtype.element_ty)
        store_tile(a, b_a, o_m, o_n, D, M, D)
        if A is not None:
            if not DROP:  # a select that Triton does not move past: it would compute act twice, for the store and for the dot
                b_a = tl.where((o_n < D)[None, :], b_a, 0.0)
            acc = add_projection(acc, b_a, A, seed, edge, o_m, o_n, n, D, R, OFFSET, DROP, PRECISION, BN, BR)
    if A is not None:
        store_tile(parts + i_n.to(tl.int64) * M * R, acc * keep_scale, o_m, tl.arange(0, BR), R, M, R)


def glu(
    e: Tensor | None, u: Tensor, A: Tensor | None, dropout: Dropout | None, activation: str, of: int = 1
) -> tuple[Tensor, Tensor | None]:
    """(a, h): act(e)·u, or act(u) where e is None, in u's dtype, and drop(a)·Aᵀ in A's, None where A is; no gaps.

    of: 2 where e and u are the halves of the rows of one tensor.
    """
    p, seed, offset = words(dropout if A is not None else None)
    R, adapter = (1, u.dtype) if A is None else (A.shape[0], A.dtype)
    key = (
        u.device, u.dtype, adapter, R, A is None, u.shape[1], e is None, p, offset,
        activation, tuning.precision(u.dtype), of,
    )  # fmt: skip
    return call("glu", gates, key, e, u, A, seed)


def gates(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    plain: bool,
    D: int,
    ungated: bool,
    p: float | None,
    offset: int,
    activation: str,
    precision: str,
    of: int,
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """run(e, u, A, seed): a and h with this tile."""
    launches = two(
        glu_kernel, tile.options(), ACT=activation, DROP=p is not None, OFFSET=offset, PRECISION=precision, OF=of,
        BM=tile.rows, BN=tile.columns, R=R, BR=tuning.padded_rank(R),
    )  # fmt: skip
    width, wanted = max(256, tile.columns), 2 * tuning.gpu(device).processors
    bits, scale = edge(p or 0.0), keep_scale(p or 0.0)

    def run(e: Tensor | None, u: Tensor, A: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        M = u.shape[0]
        programs = -(-M // tile.rows)
        count, part_columns = tuning.splits(D, width, programs, wanted)
        a = torch.empty(M, D, dtype=dtype, device=device)
        parts = None if plain else new_parts(count, M, R, dtype=adapter, device=device)
        launches[count > 1](
            (programs, count), e, u, a, A, parts, seed, bits, scale, M, D, part_columns
        )  # fmt: skip
        return a, sum_parts((parts, count, adapter))[0]

    return run
