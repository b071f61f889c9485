"""Triton's interpreter with bfloat16 made right: kernels run on a CPU, slowly, in NumPy.

Triton 3.6 and 3.9 store bfloat16 as uint16 and multiply those integers in `tl.dot`, and truncate float32 to bfloat16
where a GPU rounds to nearest even. Both are replaced here, and a check of tensor descriptors;
tests/test_triton_interpreter.py checks that they are.
"""

import os

import numpy as np
import torch

# Where the tests compute: on a GPU where there is one.
DEVICE = torch.device(os.environ.get("LORA_KERNELS_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined, so set before they are imported


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even, as bfloat16 bits (uint16); NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Replace the interpreter's bfloat16 dot and float32 <-> bfloat16 casts."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorDescHandle, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        is_bfloat16 = handle.dtype.scalar == tl.bfloat16
        return TensorHandle(to_float32(handle.data), tl.float32) if is_bfloat16 else handle

    def create_dot(self, a, b, d, *options):
        return dot(self, widened(a), widened(b), d, *options)

    def cast_impl(self, source, target):
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float32(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        return cast(self, source, target)

    def validate(self):
        """Of a tensor descriptor: Triton 3.4 takes its strides, in elements, for bytes."""
        *outer, last = (stride.data.item() for stride in self.strides)
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        assert self.base.data.item() % 16 == 0, "base must be 16-byte aligned"
        assert all(stride * itemsize % 16 == 0 for stride in outer), "stride must be 16-byte aligned"
        assert last == 1, "last dim must be contiguous"

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
    TensorDescHandle.validate = validate
