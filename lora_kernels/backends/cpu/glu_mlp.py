"""Equations 9 and 10 (reference/glu_mlp.py): PyTorch's backend, between linear layers that this one computes."""

from ...plan import Call, Plan
from ..torch.glu_mlp import through
from . import linear

FIELDS = linear.FIELDS


def plan(call: Call) -> Plan | str:
    """The loops of csrc/cpu for this call, or the reason why there are none."""
    return linear.refusal(call) or Plan("cpu", linear.WHY, *through(linear))
