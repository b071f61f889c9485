"""The constants of bitsandbytes' 4-bit formats: code values, decision thresholds, and the 8-bit map of nested absmax.

They exist once: other backends get these tensors, or check their own words against them in a test.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")
CPU = torch.device("cpu")

# float32 words; index = code. NF4: Dettmers et al. 2023, appendix E. FP4: sign, two exponent bits, one mantissa bit.
NF4_WORDS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
    " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_WORDS = (
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
    " 00000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)
FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)  # codes by rising value
QUANT_TYPES = ("nf4", "fp4")
CELLS = 32  # of [-1, 1]: each holds at most one threshold of NF4


def constant(make: Callable[..., T]) -> Callable[..., T]:
    """A function that makes its tensors once, real ones also when first called under a fake, meta or inference mode."""

    @functools.cache
    def once(*args: object) -> T:
        with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):
            return make(*args)

    return functools.wraps(make)(once)


def _floats(words: str) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(bytes.fromhex(word)[::-1] for word in words.split())), dtype=torch.float32)


@constant
def code_values(quant_type: str, device: torch.device = CPU) -> Tensor:
    """float32[16]: the value of each code."""
    return _floats({"nf4": NF4_WORDS, "fp4": FP4_WORDS}[quant_type]).to(device)


@constant
def pair_table(quant_type: str, device: torch.device) -> Tensor:
    """int64[256]: for a byte, the float32 values of its high and its low nibble, in this order in memory."""
    byte, values = torch.arange(256), code_values(quant_type)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).view(torch.int64).flatten().to(device)


@constant
def thresholds(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32[15] midpoints of neighbouring values, uint8[16] the code of each interval); a tie goes to the lower value."""
    order = torch.arange(16) if quant_type == "nf4" else torch.tensor(FP4_ORDER)
    values = code_values(quant_type)[order]
    return ((values[:-1] + values[1:]) / 2).to(device), order.to(torch.uint8).to(device)


@constant
def nf4_cells(device: torch.device) -> tuple[Tensor, Tensor]:
    """NF4's code by one look-up and one comparison: (uint8 code below, float32 threshold) for each cell of [-1, 1].

    The last cell, of 1.0 alone, has no threshold.
    """
    bounds = thresholds("nf4", CPU)[0]
    edges = torch.arange(CELLS + 1) * (2 / CELLS) - 1
    below = (bounds < edges[:, None]).sum(1)
    inside = torch.nn.functional.pad(bounds, (0, 1), value=float("inf"))[below]
    threshold = torch.where(inside < edges + 2 / CELLS, inside, torch.inf)
    return below.to(torch.uint8).to(device), threshold.to(device)


@constant
def dynamic_map() -> Tensor:
    """float32[256]: the signed 8-bit "dynamic" map (Dettmers 2015), with fused multiply-adds in its linear spacings.

    A stored state brings its own map: 42 entries differ in their last bits between CPUs with and without FMA.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2
        values += [10 ** (exponent - 6) * means, -(10 ** (exponent - 6)) * means]
    return torch.cat(values).sort().values


def _linspace(start: float, end: float, steps: int) -> Tensor:
    """torch.linspace in float32, from both ends towards the middle, each value rounded once."""
    first, last = torch.tensor([start, end]).double()
    step = ((last - first).float() / torch.tensor(float(steps - 1))).double()
    i = torch.arange(steps)
    return torch.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).float()


@constant
def nested_bins() -> Tensor:
    """uint8[65536]: the entry of the dynamic map for each of 65536 equal bins of [-1, 1], bitsandbytes' way on a CPU."""
    table = dynamic_map()
    centres = 2 * torch.arange(65536, dtype=torch.float32) / 65535 - 1
    return torch.bucketize(centres, 0.5 * (table[:-1] + table[1:])).to(torch.uint8)
