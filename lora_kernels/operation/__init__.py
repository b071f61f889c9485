"""From a call to a backend and to autograd, the same way for every operation.

In eager mode a call chooses its plan once and autograd keeps it: the backward pass runs where the forward pass ran, in any
thread and under any `use_backend`. `torch.compile` and `torch.export` see two registered operators per operation,

    torch.ops.lora_kernels.<name>           the results, and what they save for the backward pass
    torch.ops.lora_kernels.<name>_backward  the wanted gradients, in the order of their tensors
"""

from .definition import OPERATIONS, Members, Operation
from .eager import call
from .library import register

__all__ = ["OPERATIONS", "Members", "Operation", "call", "register"]
