"""NF4Weight beside the installed bitsandbytes: the same bytes, and what its own code says of them."""

import pytest
import torch

bnb = pytest.importorskip("bitsandbytes")
from bitsandbytes.backends.default import ops as plain  # noqa: E402  # the oracle where its native code is wrong

F = bnb.functional


def same_bytes(a, b):
    assert a.dtype == b.dtype
    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_state(w, codes, state):
    same_bytes(w.codes, codes.view(-1))
    same_bytes(w.absmax, state.absmax)
    assert (w.shape, w.dtype, w.blocksize, w.quant_type) == (state.shape, state.dtype, state.blocksize, state.quant_type)
    assert w.nested == state.nested
    if w.nested:
        same_bytes(w.nested_absmax, state.state2.absmax)
        same_bytes(w.nested_map, state.state2.code)
        same_bytes(w.nested_offset, state.offset)


def oracle(codes, state, dtype):
    """bitsandbytes' dequantised values, by its plain PyTorch code: its AVX512 code misplaces absmax where K % blocksize != 0,
    and reads what is nested as an array of shape[0] = 1 if the weight is a vector.
    """
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    compute = plain._dequantize_4bit_compute.__wrapped__
    return compute(codes.view(-1), absmax, state.code, state.blocksize, state.shape, dtype)


def native(codes, state):
    """bitsandbytes' own dequantised values; without AVX512 its code makes -0 of FP4's second zero, which its table has as 0."""
    return F.dequantize_4bit(codes, state) + 0.0
