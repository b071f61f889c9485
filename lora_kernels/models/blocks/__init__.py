"""Blocks of a model as one operation each: q, k and v over one x, and whole MLPs.

fusing    fuse_blocks, unfuse_blocks: what there is, what becomes of it
finding   which modules may be blocks, by their children
wiring    what an MLP's forward does, found by running it
mlps      its forward as lora_glu_mlp
groups    siblings as lora_linear_group, and the hand-over of the results
report    what was done, and what the calls did
"""

from .fusing import fuse_blocks, fuse_what_can_be, unfuse_blocks
from .report import BlockReport

__all__ = ["BlockReport", "fuse_blocks", "fuse_what_can_be", "unfuse_blocks"]
