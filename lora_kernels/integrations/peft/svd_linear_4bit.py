"""The accelerated form of PEFT's AdaLoRA layer over bitsandbytes' Linear4bit; importing this needs bitsandbytes."""

from peft.tuners.adalora.bnb import SVDLinear4bit

from .linear import Accelerated, ShownAsPeft


class AcceleratedSVDLinear4bit(Accelerated, SVDLinear4bit, metaclass=ShownAsPeft):
    """peft.tuners.adalora.bnb.SVDLinear4bit, computed by lora_linear with E ⊙ A as A on the same 4-bit bytes."""
