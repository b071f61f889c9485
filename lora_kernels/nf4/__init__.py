"""bitsandbytes' 4-bit storage: the weight, its constants, the keys of a state dict."""

from .weight import NF4Weight

__all__ = ["NF4Weight"]
