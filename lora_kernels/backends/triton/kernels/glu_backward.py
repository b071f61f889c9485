"""de and du, and all that reads them or a: down's undrop(g·A) and dA, and g, dB and dc of gate and up, in one pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import keep_scale
from ....values import Dropout
from .. import tuning
from ..launch import call, dtype_of, two
from ..tuning import Tile
from .activation import gate_of, slope_of
from .grad_dy import Three, add_reductions, store_reductions
from .grad_x import store_part
from .mask import edge, keep_tile
from .members import Kinds, constants, most, words
from .sums import new_parts, sum_parts
from .tiles import dot, load_tile, scalar


@triton.jit(do_not_specialize=["M", "edge"])
def glu_backward_kernel(
    da, e, u, de, du, g, A, parts_dA, h_gate, B_gate, parts_g_gate, parts_dB_gate, parts_dc_gate, s_gate,
    h_up, B_up, parts_g_up, parts_dB_up, parts_dc_up, s_up, seed, edge, keep_scale, M, D, part_rows,
    ACT: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, OF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    OFFSET0: tl.constexpr, OFFSET1: tl.constexpr, OFFSET2: tl.constexpr,
    BR0: tl.constexpr, BR1: tl.constexpr, BR2: tl.constexpr,
):  # fmt: skip
    """de = da·u·act'(e), du = da·act(e), or du = da·act'(u) where e is None, with da + undrop(g·A) in the place of da.

    A program owns a strip of BN columns and a range of rows, as in grad_dy, whose sums follow de and du, and in grad_x, which
    it is to a. de or du may be da's memory. What is None is not computed, or not there. Member 0 is down, 1 gate, 2 up.
    e, u, de and du are each one of OF parts of rows of OF·D columns.

    All tiles follow the layout of (Aᵀ·gᵀ)ᵀ, which on sm_90 gives each warp columns of its own, where g·A would have eight
    warps compute 64 rows twice. The comparison that is always true, and costs nothing, ties act to that layout too: otherwise
    Triton computes it once for each of its readers' layouts, 125 instructions an element in the place of 60.
    """
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    n, o_n = i_n * BN, i_n * BN + tl.arange(0, BN)
    if DROP:
        seed = tl.load(seed)
    b_A, b_B_gate, b_B_up = None, None, None
    if A is not None:
        b_A = load_tile(A, tl.arange(0, BR0), o_n, D, R0, D)
    if parts_g_gate is not None:
        b_B_gate = load_tile(B_gate, o_n, tl.arange(0, BR1), R1, D, R1)
    if parts_g_up is not None:
        b_B_up = load_tile(B_up, o_n, tl.arange(0, BR2), R2, D, R2)
    s_gate, s_up = scalar(s_gate), scalar(s_up)
    o_tile = tl.arange(0, BM)[:, None] * D + o_n[None, :]
    o_part = tl.arange(0, BM)[:, None] * (D * OF) + o_n[None, :]
    acc_dA = tl.zeros([BN, BR0], tl.float32)
    dB_gate, dc_gate = tl.zeros([BN, BR1], tl.float32), tl.zeros([BN], tl.float32)
    dB_up, dc_up = tl.zeros([BN, BR2], tl.float32), tl.zeros([BN], tl.float32)
    for m in range(i_m * part_rows, tl.minimum(M, (i_m + 1) * part_rows), BM):
        o_m = m + tl.arange(0, BM)
        tile, part, inside = tl.cast(m, tl.int64) * D, tl.cast(m, tl.int64) * D * OF, (o_m < M)[:, None] & (o_n < D)[None, :]
        if g is not None:
            b_g = load_tile(g, o_m, tl.arange(0, BR0), R0, M, R0)
            if DROP:
                keep = keep_tile(seed, edge, o_m, n, OFFSET0, BN)
        if u is not None:
            b_u = tl.load(u + part + o_part, mask=inside, other=0.0)
        b_v = tl.load(e + part + o_part, mask=inside, other=0.0) if e is not None else b_u
        if da is not None:
            b_da = tl.load(da + tile + o_tile, mask=inside, other=0.0).to(tl.float32)
            if A is not None:
                low_rank = keep_scale * tl.trans(dot(b_A.T, b_g.T, None, PRECISION))
                b_v = tl.where(low_rank.to(tl.int32, bitcast=True) >= -2147483648, b_v, 0.0)
                b_da += tl.where(keep, low_rank, 0.0) if DROP else low_rank
        b_v = b_v.to(tl.float32)
        gate = gate_of(b_v, ACT)
        act = b_v * gate
        if parts_dA is not None:
            b_a = (act * b_u.to(tl.float32) if e is not None else act).to(u.dtype.element_ty)
            if DROP:
                b_a = tl.where(keep, b_a, 0.0)
            acc_dA = dot(b_a.T, b_g, acc_dA, PRECISION)
        if da is not None:
            if e is None:
                b_du = (b_da * slope_of(b_v, gate, act, ACT)).to(du.dtype.element_ty)
            elif du is not None:
                b_du = (b_da * act).to(du.dtype.element_ty)
            if de is not None:
                b_de = (b_da * b_u.to(tl.float32) * slope_of(b_v, gate, act, ACT)).to(de.dtype.element_ty)
                tl.store(de + part + o_part, b_de, mask=inside)
                dB_gate, dc_gate = add_reductions(
                    b_de, h_gate, b_B_gate, parts_g_gate, parts_dB_gate, parts_dc_gate, dB_gate, dc_gate, s_gate,
                    i_n, o_m, M, R1, PRECISION, BR1,
                )  # fmt: skip
            if du is not None:
                tl.store(du + part + o_part, b_du, mask=inside)
                dB_up, dc_up = add_reductions(
                    b_du, h_up, b_B_up, parts_g_up, parts_dB_up, parts_dc_up, dB_up, dc_up, s_up,
                    i_n, o_m, M, R2, PRECISION, BR2,
                )  # fmt: skip
    if parts_dA is not None:
        store_part(parts_dA, acc_dA, keep_scale, i_m, o_n, D, R0, BR0)
    store_reductions(parts_dB_gate, parts_dc_gate, dB_gate, dc_gate, s_gate, i_m, o_n, D, R1, BR1)
    store_reductions(parts_dB_up, parts_dc_up, dB_up, dc_up, s_up, i_m, o_n, D, R2, BR2)


class Down(NamedTuple):
    """What da still lacks is undrop(g·A), where A is given; dA if it is needed. g is None without adapters."""

    g: Tensor | None
    A: Tensor | None
    dropout: Dropout | None
    need_A: bool


class Entry(NamedTuple):
    """Gate or up: whether de or du is needed, and of it g, dB and dc."""

    needed: bool
    h: Tensor | None
    B: Tensor | None
    s: float | Tensor
    need_g: bool
    need_B: bool
    need_c: bool

    @property
    def kind(self) -> tuple[int, torch.dtype] | None:
        tensor = self.B if self.need_g else self.h if self.need_B else None
        return None if tensor is None else (tensor.shape[1], tensor.dtype)


NOTHING = Entry(False, None, None, 1.0, False, False, False)


class Found(NamedTuple):
    """de, du and down's dA, and (g, dB, dc) of gate and up, each where it was needed."""

    de: Tensor | None
    du: Tensor | None
    dA: Tensor | None
    gate: Three
    up: Three


def glu_backward(
    da: Tensor | None, e: Tensor | None, u: Tensor | None, down: Down, gate: Entry, up: Entry, activation: str,
    dh: Tensor | None = None,
) -> Found:  # fmt: skip
    """The gradients of a = act(e)·u (act(u) where e is None), and what they and a are read for; [M, D] without gaps.

    da is written to: it becomes de, or du; unless there is a dh[M, 2·D], of which these are the halves, as e and u are of one
    tensor, or a dh[M, D] for du alone.
    """
    first = e if u is None else u
    device, dtype, D = first.device, first.dtype, first.shape[1]
    p, seed, offset = words(down.dropout)
    own = None if down.g is None else (down.g.shape[1], down.g.dtype)
    kinds = tuple([kind or (1, dtype) for kind in (own, gate.kind, up.kind)])
    flags = tuple([(entry.needed, *entry[4:], dtype_of(entry.s)) for entry in (gate, up)])
    key = (
        device, dtype, *most(dtype, kinds), kinds, D, p, offset, activation, da is None, e is None, u is None, own is None,
        down.A is None, down.need_A, flags, tuning.precision(dtype), 1 if dh is None else dh.shape[1] // D,
    )  # fmt: skip
    return call("glu_backward", gate_gradients, key, da, e, u, down, gate, up, seed, dh)


def gate_gradients(
    tile: Tile,
    device: torch.device,
    dtype: torch.dtype,
    adapter: torch.dtype,
    R: int,
    kinds: Kinds,
    D: int,
    p: float | None,
    offset: int,
    activation: str,
    *forms: object,
) -> Callable[..., Found]:
    """run(da, e, u, down, gate, up, seed, dh): everything with this tile."""
    launches = two(
        glu_backward_kernel, tile.options(), ACT=activation, DROP=p is not None, PRECISION=forms[-2], OF=forms[-1],
        BM=tile.rows, BN=tile.columns, **constants(kinds, (offset, 0, 0)),
    )  # fmt: skip
    strips, programs = -(-D // tile.columns), 2 * tuning.gpu(device).processors
    bits, scale = edge(p or 0.0), keep_scale(p or 0.0)
    (R, of_A), *of_entries = kinds

    def parts_of(entry: Entry, kind: tuple[int, torch.dtype], M: int, count: int) -> tuple:
        (R, own), room = kind, {"device": device}
        parts_g = new_parts(strips, M, R, dtype=own, **room) if entry.need_g else None
        parts_dB = new_parts(count, D, R, dtype=own, **room) if entry.need_B else None
        return parts_g, parts_dB, new_parts(count, D, dtype=torch.float32, **room) if entry.need_c else None

    def run(
        da: Tensor | None, e: Tensor | None, u: Tensor | None, down: Down, gate: Entry, up: Entry, seed: Tensor | None,
        dh: Tensor | None,
    ) -> Found:  # fmt: skip
        M = (e if u is None else u).shape[0]
        count, part_rows = tuning.splits(M, tile.rows, strips, programs)
        de, du = da if gate.needed else None, None
        if up.needed:
            du = da if de is None else torch.empty_like(da)
        if dh is not None:
            de, du = (None, dh) if e is None else (dh[:, :D], dh[:, D:])
        parts_dA = new_parts(count, R, D, dtype=of_A, device=device) if down.need_A else None
        parts = [parts_of(entry, kind, M, count) for entry, kind in zip((gate, up), of_entries, strict=True)]
        sides = [(entry.h if entry.need_B else None, entry.B if entry.need_g else None) for entry in (gate, up)]
        launches[count > 1](
            (strips, count), da, e, u, de, du, down.g, down.A, parts_dA, *sides[0], *parts[0], gate.s, *sides[1], *parts[1],
            up.s, seed, bits, scale, M, D, part_rows,
        )  # fmt: skip
        of_parts = [(parts_dA, count, of_A)]
        for (parts_g, parts_dB, parts_dc), (_, own) in zip(parts, of_entries, strict=True):
            of_parts += [(parts_g, strips, own), (parts_dB, count, own), (parts_dc, count, torch.float32)]
        dA, *found = sum_parts(*of_parts)
        return Found(de, du, dA, tuple(found[:3]), tuple(found[3:]))  # type: ignore[arg-type]

    return run
