"""Segments: which rows of a batch belong to which expert or adapter, sorted once and shared by every layer of a step."""

from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


class Segments(NamedTuple):
    """The rows i of segment e are order[j] for offsets[e] <= j < offsets[e + 1].

    offsets: int32[count + 1], from 0 to the number of rows that have a segment. order: int64[M], the rows by segment, those of
    one in the order in which they were, those of none last. inverse: int64[M], where order[inverse[i]] = i: x[order] is sorted,
    and y[inverse] as x was. host: the offsets on the CPU, None where the host does not know them.
    """

    offsets: Tensor
    order: Tensor
    inverse: Tensor
    host: Tensor | None = None

    @classmethod
    def from_ids(cls, ids: Tensor, count: int) -> "Segments":
        """The segments 0 … count - 1 of ids[M], -1 for a row of none, by one stable sort on their device, which no host awaits.

        ids of any shape are read as rows in order, as those of x[..., K]. Of ids from a CPU, and after `.to` a GPU, the host
        knows how many rows each segment has: `multi_lora_linear` has no gradient then for an adapter without any, not zeros.
        Raises TypeError or ValueError for ids that are no integers, and on a CPU for those outside of -1 … count - 1; on
        another device, where nobody looks, such a row is one of none.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"ids: got {got}, expected a torch.int32 or int64 tensor; use torch.as_tensor(ids)")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count: got {count!r}, expected an int of at least 1")
        ids = ids.reshape(-1)
        outside = (ids < -1) | (ids >= count)
        on_host = type(ids) is Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and bool(outside.any()):
            raise ValueError(f"ids: got {int(ids[outside][0])}, expected -1 for none, or 0 to {count - 1}")
        keys = ids.masked_fill(outside | (ids < 0), count)
        by_segment, order = torch.sort(keys, stable=True)
        bounds = torch.arange(count + 1, device=ids.device, dtype=ids.dtype)
        offsets = torch.searchsorted(by_segment, bounds, out_int32=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=ids.device))
        return cls(offsets, order, inverse, offsets if on_host else None)

    @property
    def number(self) -> int:
        """Of segments, with rows or without."""
        return self.offsets.shape[0] - 1

    @property
    def rows(self) -> int:
        """M, those of no segment among them."""
        return self.order.shape[0]

    def read(self) -> "Segments":
        """The same, their numbers known to the host, which waits for the device once, and not in each layer that needs them."""
        return self if self.host is not None else Segments(self.offsets, self.order, self.inverse, self.offsets.cpu())

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "Segments":
        """On `device`; what the host knows it keeps."""
        moved = [t.to(device, non_blocking=non_blocking) for t in (self.offsets, self.order, self.inverse)]
        return Segments(moved[0], moved[1], moved[2], self.host)
