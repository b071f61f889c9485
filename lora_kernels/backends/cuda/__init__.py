"""4-bit base weights on NVIDIA GPUs by the compiled extension (csrc/): dequantised, quantised, and multiplied with few tokens.

extension.py holds lora_kernels._C and hands it tensors as addresses. Without it there is no such backend.
"""

from . import extension  # noqa: F401
