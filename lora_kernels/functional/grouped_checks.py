"""Whether the arguments of calls over segments fit, as checks.py for one projection."""

import math
from typing import Any

from torch import Tensor

from ..mask import check_p
from ..nf4 import NF4Weight
from ..operation import Members
from ..segments import Segments
from ..values import LoRAAdapter, LoRAWeights, Rows
from .checks import check_dtypes, check_member, check_scaling, check_tensors


def check_segments(x: Any, segments: Any) -> None:
    """Raise TypeError or ValueError unless these are segments of as many rows as x has: at each call, for M may differ."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a torch.Tensor")
    if not isinstance(segments, Segments):
        raise TypeError(f"segments: got {type(segments).__name__}, expected Segments; use Segments.from_ids(ids, count)")
    if (M := math.prod(x.shape[:-1])) != segments.rows:
        raise ValueError(
            f"segments: got {segments.rows} rows, expected {M} for x {tuple(x.shape)}; use Segments.from_ids of its ids"
        )
    if segments.offsets.device != x.device:
        raise ValueError(
            f"segments: got offsets on {segments.offsets.device}, expected {x.device} as x; use segments.to(x.device)"
        )


def check_adapters(adapters: tuple[Any, ...], segments: Segments) -> None:
    """Raise TypeError or ValueError unless there is a LoRAAdapter for each segment."""
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, LoRAAdapter):
            raise TypeError(f"adapters[{i}]: got {type(adapter).__name__}, expected LoRAAdapter(lora_A, lora_B, …)")
        check_p(adapter.dropout_p, f"adapters[{i}].dropout_p")
    if len(adapters) != segments.number:
        raise ValueError(
            f"adapters: got {len(adapters)}, expected {segments.number}, one for each of the segments; "
            "use Segments.from_ids(ids, len(adapters))"
        )


def check_list(x: Tensor, members: Members, of: Rows) -> None:
    """Raise TypeError or ValueError unless a base and the adapters of several segments fit x and one another."""
    weight, _, _, bias, _, _ = members[0]
    check_member(x, LoRAWeights(weight, None, None, bias))
    for i, (_, A, B, _, s, _) in enumerate(members[1:]):
        if A is None:
            raise TypeError(f"adapters[{i}].lora_A: got None, expected a torch.Tensor; for no adapter use the id -1")
        check_member(x, LoRAWeights(weight, A, B, bias, s), f"adapters[{i}].")
        first = members[1].lora_A
        if first is not None and A.dtype != first.dtype:
            raise TypeError(f"adapters[{i}].lora_A: got dtype {A.dtype}, expected {first.dtype} as adapters[0]; use .to(dtype)")
    if of.order is not None and of.order.shape[0] != (M := math.prod(x.shape[:-1])):
        raise ValueError(f"segments: got {of.order.shape[0]} rows, expected {M} for x {tuple(x.shape)}")


def check_stack(x: Tensor, member: LoRAWeights, of: Rows) -> None:
    """Raise TypeError or ValueError unless stacks, one projection for each segment, fit x and one another."""
    for name in ("lora_A", "lora_B"):
        if getattr(member, name) is None:
            raise TypeError(f"{name}: got None, expected a torch.Tensor; for no adapter use torch.nn.functional.grouped_mm")
    check_tensors(x, member, "")
    weight, A, B, bias, scaling, _ = member
    E = of.offsets.shape[0] - 1
    if weight.ndim not in (2, 3) or (weight.ndim == 3 and weight.shape[0] != E):
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected [{E}, N, K], or [N, K] for all segments")
    N, K = weight.shape[-2:]
    R = A.shape[1] if A.ndim == 3 else 0  # type: ignore[union-attr]
    if A.ndim == 3 and R == 0:  # type: ignore[union-attr]
        raise ValueError(f"lora_A: got rank 0 (shape {tuple(A.shape)}), expected at least 1")  # type: ignore[union-attr]
    for name, tensor, shape, letters in (("lora_A", A, (E, R, K), f"{E}, R, {K}"), ("lora_B", B, (E, N, R), f"{E}, {N}, {R}")):
        if tensor.shape != shape:  # type: ignore[union-attr]
            got, turned = tuple(tensor.shape), len(tensor.shape) == 3 and tensor.mT.shape == shape  # type: ignore[union-attr]
            cure = f"; use {name}.mT" if turned else ""
            raise ValueError(f"{name}: got shape {got}, expected [{letters}] for weight {tuple(weight.shape)}{cure}")
    if bias is not None and bias.shape != (N,) and bias.shape != (E, N):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected [{E}, {N}], or [{N}] for all segments")
    if x.shape[-1] != K:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [M, {K}] for weight {tuple(weight.shape)}")
    if isinstance(weight, NF4Weight) and weight.ndim == 3 and N * K % weight.blocksize:
        raise ValueError(
            f"weight: got blocks of {weight.blocksize} over segments of {N}·{K} elements, expected blocks that end with them; "
            "use a blocksize that divides N·K"
        )
    check_dtypes(x, member, "")
    check_scaling(scaling, x.device, "")
