"""Which tile and which dataflow a call gets: what was measured on its GPU (tuned.py), then frozen tables.

The tables come from offline compilation (kernels.json: registers, spills, shared memory), not from measurements.
A device or shape without a measurement gets the prefill dataflow.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tuned import CONTRACTIONS, RANKS, TOKENS, Measured, Tile, read


class Gpu(NamedTuple):
    capability: tuple[int, int]
    processors: int
    name: str = ""  # of a real one: what its measurements are filed under


INTERPRETED = Gpu((8, 0), 4)  # few processors, so that small tests split their reductions as large calls do
MAX_RANK = 64  # wider adapters are ordinary matrix products: the vendor's

# ---- tiles: rows × columns of x or dy ----

SUM = Tile(rows=16, columns=256, warps=4)  # 16 partial sums × 256 outputs
ELEMENTWISE = Tile(rows=16, columns=256, warps=4)
COLUMN_SUMS = Tile(rows=16, columns=256, warps=8)  # of what is added up over rows
DEQUANTIZE = Tile(rows=1, columns=2048, warps=8)  # bytes; a block of 4096 codes is one tile

_SAFE = {  # after the table's own tile: needs little of anything
    "project": Tile(32, 32, 4, 2),
    "prefill": Tile(32, 64, 4),
    "grad_dy": Tile(16, 32, 4, 2),
    "grad_x": Tile(16, 32, 4, 2),
    "project_group": Tile(32, 32, 4, 2),
    "grad_x_group": Tile(16, 32, 8, 2),
    "glu": Tile(32, 32, 4, 2),
    "glu_backward": Tile(16, 32, 4, 2),
    "row_norm": Tile(32, 64, 4, 2),
    "lowrank_product": Tile(32, 64, 4, 2, 32),
    "lowrank_product_tma": Tile(32, 64, 4, 2, 32),
    "nf4_product": Tile(32, 64, 4, 2, 32),
}

# Arithmetic "16" is one 16-bit type, "mixed" 16-bit activations with other adapters, "32" float32 activations; the last
# part is the largest padded rank. Strips of dy are as wide as registers allow, because each writes its own partial sums of
# g: 4·R / (2·columns) of dy's bytes, an eighth at 256 columns and rank 16. For "mixed" tensor descriptors need 128x128:
# with 128x256 Triton 3.6 silently emits an empty kernel for sm_100, whose tensor memory does not hold two accumulators.
# So it does of row_norm with 64x128, for the six products of its parts.
TILES: dict[tuple[str, str, int], Tile] = {
    ("project", "16", 32): Tile(64, 128, 8, 4),
    ("project", "16", 64): Tile(64, 64, 8, 4),
    ("project", "mixed", 32): Tile(128, 64, 8, 3),
    ("project", "mixed", 64): Tile(32, 64, 8, 3),
    ("project", "32", 32): Tile(32, 64, 8, 3),
    ("project", "32", 64): Tile(32, 64, 8, 3),
    ("prefill", "16", 32): Tile(64, 128, 8),
    ("prefill", "16", 64): Tile(64, 128, 8),
    ("prefill", "mixed", 32): Tile(64, 128, 4),
    ("prefill", "mixed", 64): Tile(128, 64, 8),
    ("prefill", "32", 32): Tile(64, 128, 8),
    ("prefill", "32", 64): Tile(64, 64, 8),
    ("grad_dy", "16", 32): Tile(64, 256, 8, 3),
    ("grad_dy", "16", 64): Tile(64, 256, 8, 3),
    ("grad_dy", "mixed", 32): Tile(32, 128, 8, 3),
    ("grad_dy", "mixed", 64): Tile(32, 64, 8, 2),
    ("grad_dy", "32", 32): Tile(32, 64, 8, 2),
    ("grad_dy", "32", 64): Tile(32, 64, 8, 2),
    ("grad_x", "16", 32): Tile(64, 128, 8, 3),
    ("grad_x", "16", 64): Tile(32, 128, 8, 3),
    ("grad_x", "mixed", 32): Tile(32, 128, 8, 3),
    ("grad_x", "mixed", 64): Tile(32, 64, 8, 2),
    ("grad_x", "32", 32): Tile(32, 32, 8, 2),
    ("grad_x", "32", 64): Tile(32, 32, 8, 2),
    ("project_group", "16", 32): Tile(64, 64, 8, 3),
    ("project_group", "16", 64): Tile(64, 64, 8, 3),
    ("project_group", "mixed", 32): Tile(64, 64, 8, 3),
    ("project_group", "mixed", 64): Tile(32, 64, 8, 2),
    ("project_group", "32", 32): Tile(32, 64, 8, 3),
    ("project_group", "32", 64): Tile(32, 32, 8, 2),
    ("grad_x_group", "16", 32): Tile(32, 64, 8, 2),
    ("grad_x_group", "16", 64): Tile(32, 64, 8, 2),
    ("grad_x_group", "mixed", 32): Tile(32, 64, 8, 2),
    ("grad_x_group", "mixed", 64): Tile(16, 32, 4, 2),
    ("grad_x_group", "32", 32): Tile(32, 32, 8, 2),
    ("grad_x_group", "32", 64): Tile(16, 32, 8, 2),
    ("glu", "16", 32): Tile(64, 64, 8, 2),
    ("glu", "16", 64): Tile(64, 64, 8, 3),
    ("glu", "mixed", 32): Tile(64, 64, 8, 2),
    ("glu", "mixed", 64): Tile(32, 64, 8, 2),
    ("glu", "32", 32): Tile(32, 64, 8, 2),
    ("glu", "32", 64): Tile(32, 32, 8, 2),
    ("glu_backward", "16", 32): Tile(32, 128, 8, 2),
    ("glu_backward", "16", 64): Tile(32, 32, 8, 2),
    ("glu_backward", "mixed", 32): Tile(32, 64, 8, 2),
    ("glu_backward", "mixed", 64): Tile(16, 32, 4, 2),
    # of 64 columns Triton 3.6 multiplies in TF32 on sm_100, although "ieee" is asked for
    ("glu_backward", "32", 32): Tile(32, 32, 8, 2),
    ("glu_backward", "32", 64): Tile(16, 32, 8, 2),
    ("row_norm", "16", 32): Tile(64, 128, 8, 3),
    ("row_norm", "16", 64): Tile(64, 128, 8, 3),
    ("row_norm", "mixed", 32): Tile(32, 128, 8, 2),
    ("row_norm", "mixed", 64): Tile(32, 64, 8, 2),
    ("row_norm", "32", 32): Tile(32, 128, 8, 2),
    ("row_norm", "32", 64): Tile(64, 64, 8, 2),
    ("lowrank_product", "16", 32): Tile(128, 128, 8, 3, 64),
    ("lowrank_product", "16", 64): Tile(128, 128, 8, 3, 64),
    ("lowrank_product", "mixed", 32): Tile(128, 128, 8, 3, 64),
    ("lowrank_product", "mixed", 64): Tile(64, 128, 8, 3, 32),
    ("lowrank_product_tma", "16", 32): Tile(128, 256, 8, 3, 64, tma=True),
    ("lowrank_product_tma", "16", 64): Tile(128, 256, 8, 3, 64, tma=True),
    ("lowrank_product_tma", "mixed", 32): Tile(128, 128, 8, 3, 64, tma=True),
    ("lowrank_product_tma", "mixed", 64): Tile(128, 128, 8, 3, 64, tma=True),
    ("nf4_product", "16", 32): Tile(64, 128, 8, 3, 64),
    ("nf4_product", "16", 64): Tile(64, 128, 8, 3, 64),
    ("nf4_product", "mixed", 32): Tile(64, 128, 8, 3, 64),
    ("nf4_product", "mixed", 64): Tile(64, 128, 8, 3, 64),
}

# wgmma takes its accumulators 16 rows a warp. Where a tile has fewer, the products of a chain get two layouts, and the sum of
# those before the last goes through shared memory: 21 barriers in a prefill of 64 rows and 8 warps, 9 in one of 4 warps.
# Two programs of 8 warps share a processor: for grad_x with dropout that takes a limit of 128 registers, from 161.
SM_90: dict[tuple[str, str, int], Tile] = {
    ("project", "16", 32): Tile(32, 256, 8, 3),
    ("project", "16", 64): Tile(64, 128, 8, 3),
    ("project", "mixed", 64): Tile(128, 32, 8, 3),
    ("grad_dy", "16", 32): Tile(32, 512, 8, 2),
    ("grad_dy", "16", 64): Tile(32, 256, 8, 3),
    ("grad_dy", "mixed", 32): Tile(32, 256, 4, 3),
    ("grad_dy", "mixed", 64): Tile(32, 128, 8, 2),
    ("grad_x", "16", 32): Tile(64, 128, 8, 2, maxnreg=128),
    ("grad_x", "16", 64): Tile(64, 64, 8, 3),
    ("grad_x", "mixed", 32): Tile(32, 128, 8, 2, maxnreg=128),
    ("grad_x", "mixed", 64): Tile(64, 64, 4, 2),
    ("glu_backward", "16", 32): Tile(64, 128, 8, 2),
    ("glu_backward", "16", 64): Tile(32, 128, 8, 2),
    ("glu_backward", "mixed", 32): Tile(32, 64, 4, 2),
    ("glu_backward", "mixed", 64): Tile(16, 64, 8, 2),
    ("row_norm", "mixed", 32): Tile(64, 64, 4, 2),
    ("row_norm", "mixed", 64): Tile(64, 64, 4, 2),
}


def tiles(kernel: str, kind: str, R: int, capability: tuple[int, int]) -> tuple[Tile, ...]:
    """The tiles to try without a measurement, best first."""
    key = kernel, kind, rank_class(R)
    best = SM_90.get(key) if capability == (9, 0) else None
    return best or TILES[key], _SAFE[kernel]


def rank_class(R: int) -> int:
    """The class of rank R in the tables."""
    return next(limit for limit in RANKS if limit >= R)


# ---- prefill and the vendor's product, or both in one kernel ----

TMA_GPUS = ((9, 0), (10, 0), (10, 3))


def dataflow(a: Tensor, W: Tensor, direction: str) -> str:
    """ "lowrank_product" or "prefill" for the product of a[M, C] with 16-bit W, "forward" or "backward".

    One kernel only where a measurement on this GPU says that it wins. What it must reach for that, by bytes saved: 0.94 of the
    vendor's speed at a contraction of 4096, 0.97 at 8192, 0.98 at 14336.
    """
    flow = trial.get("dataflow")
    if flow is None:
        found = measured(a.device)
        flow = found.flow(direction, *shape_class(*a.shape)) if found.dataflow else "prefill"
    return flow if flow == "prefill" or (a.dtype != torch.float32 and W.stride(1) == 1) else "prefill"


def shape_class(M: int, contraction: int) -> tuple[str, str]:
    """(class of the contraction, class of the tokens) under which a product a[M, contraction] is measured."""
    return CONTRACTIONS[(contraction > 4096) + (contraction > 8192)], TOKENS[M > 1024]


def tma_legal(*tensors: Tensor, columns: int) -> bool:
    """Whether tensor descriptors can describe these matrices and a fresh one of `columns`: 16-byte rows and starts."""
    strides = [t.stride(0) * t.element_size() for t in tensors] + [columns * tensors[0].element_size()]
    return all(stride % 16 == 0 and stride > 0 for stride in strides) and all(t.data_ptr() % 16 == 0 for t in tensors)


def arithmetic(activations: torch.dtype, adapters: torch.dtype) -> str:
    """The class of a dtype pair in the tables."""
    if activations == torch.float32:
        return "32"
    return "16" if activations == adapters else "mixed"


def precision(activations: torch.dtype) -> str:
    """How tiles.dot multiplies: "parts" with 16-bit activations, over float32 ones by PyTorch's own rule for TF32."""
    if activations != torch.float32:
        return "parts"
    matmul = torch.backends.cuda.matmul
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"


def padded_rank(R: int) -> int:
    """The rank as a tile dimension: a power of two, at least 16."""
    return max(16, 1 << (R - 1).bit_length())


def splits(width: int, tile: int, programs: int, wanted: int) -> tuple[int, int]:
    """(parts, part width) that cut `width` into whole tiles so that `programs` × parts comes near `wanted`."""
    tiles = -(-width // tile)  # triton.cdiv takes 1.5 µs
    per_part = -(-tiles // max(1, min(tiles, wanted // max(1, programs))))
    return -(-tiles // per_part), per_part * tile


@functools.cache
def gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count, properties.name)


# ---- what was measured on this machine's GPUs ----

trial: dict[str, Any] = {}
"""What `lora-kernels tune` tries: kernel -> the one tile that its calls take, "dataflow" -> the one of every call."""


@functools.cache
def measured(device: torch.device) -> Measured:
    """The choices measured on this GPU, read once; empty for a GPU without a file and for the interpreter."""
    found = gpu(device)
    return read(found.name, found.capability) if found.name else Measured()


def candidates(kernel: str, kind: str, R: int, device: torch.device) -> tuple[Tile, ...]:
    """The tiles to try on this device: the one on trial alone, or the measured one before those of the table."""
    if kernel in trial:
        return (trial[kernel],)
    best = measured(device).tile(kernel, kind, rank_class(R))
    return (*([best] if best else []), *tiles(kernel, kind, R, gpu(device).capability))
