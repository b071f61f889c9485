"""The accelerated form of PEFT's AdaLoRA layer."""

from peft.tuners.adalora import SVDLinear

from .linear import Accelerated, ShownAsPeft


class AcceleratedSVDLinear(Accelerated, SVDLinear, metaclass=ShownAsPeft):
    """peft.tuners.adalora.SVDLinear over nn.Linear or transformers' Conv1D, computed by lora_linear with E ⊙ A as A."""
