"""BlockReport: what is fused in a model now, what is not and why, and what the calls did."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..names import grouped
from .groups import FUSED, groups_of
from .mlps import block_of


@dataclass(frozen=True)
class BlockReport:
    """What `fuse_blocks` did; str() is for people.

    groups: the siblings that are computed together, as "model.layers.0.self_attn.{q_proj,k_proj,v_proj}". mlps: paths of the
    MLPs whose forward is one operation. skipped: other modules with adapted layers that look like one of these, and why not.
    """

    model: nn.Module = field(repr=False)
    groups: list[str] = field(default_factory=list)
    mlps: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def calls(self) -> dict[str, int]:
        """Calls so far: how many operations were "fused", and for each reason how many calls of an MLP or of a group's member
        computed as without fuse_blocks.

        Calls inside a graph of torch.compile are not counted; there a group's members compute alone, and MLPs as one.
        """
        total = Counter({FUSED: 0})
        for module in self.model.modules():
            block = block_of(module)
            for counts in (*([] if block is None else [block.calls]), *(group.calls for group in groups_of(module))):
                total.update(counts)
        return dict(total)

    def __str__(self) -> str:
        kinds = Counter(group.rpartition(".")[2] for group in self.groups)
        found = [f"{count} × {kind}" for kind, count in kinds.items()] + [f"{len(self.mlps)} MLPs"] * bool(self.mlps)
        lines = [f"fused blocks: {', '.join(found) or 'none'}"]
        return "\n".join(lines + [f"  not fused: {line}" for line in grouped(self.skipped)])

    __repr__ = __str__
