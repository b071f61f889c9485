"""The accelerated form of PEFT's layer over bitsandbytes' Linear4bit; importing this needs bitsandbytes."""

from peft.tuners.lora.bnb import Linear4bit

from .linear import Accelerated, ShownAsPeft


class AcceleratedLinear4bit(Accelerated, Linear4bit, metaclass=ShownAsPeft):
    """peft.tuners.lora.bnb.Linear4bit, computed by lora_linear on the same 4-bit bytes."""
