"""The CUDA kernels touch what is theirs: behind the last byte of each array lie pages that no process may read or write."""

import ctypes
import faulthandler
import mmap
import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from csrc_emulator import dequantised, quantised
from torch import Tensor

from lora_kernels import NF4Weight, quantize_nf4

BF16 = torch.bfloat16
PAGE = mmap.PAGESIZE


def at_an_end(t: Tensor) -> Tensor:
    """A copy of t that ends where forbidden pages begin."""
    size = -(-t.nbytes // PAGE) * PAGE
    pages = mmap.mmap(-1, size + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), PAGE, 0) == 0
    return torch.frombuffer(pages, dtype=t.dtype, count=t.numel(), offset=size - t.nbytes).view(t.shape).copy_(t)


def weight(*shape: int, nested: bool) -> NF4Weight:
    w = quantize_nf4(torch.randn(shape), double_quant=nested)
    return w.with_tensors(**{name: at_an_end(t) for name, t in w.tensors().items()})


def dequantise(cuda: ModuleType) -> None:
    """Word by word and element by element; in each the last thread's eight elements are cut off."""
    for shape in ((5, 40), (3, 7)):
        for nested in (False, True):
            w = weight(*shape, nested=nested)
            for dtype in (BF16, torch.float32):
                dequantised(w, out=at_an_end(torch.empty(shape, dtype=dtype)))


def multiply(cuda: ModuleType) -> None:
    """Of 16 rows of W, 8 or 16 tokens and 64 codes some are not there."""
    for M, nested in ((5, False), (11, True)):
        x, W = at_an_end(torch.randn(M, 80).to(BF16)), weight(17, 80, nested=nested)
        h, B, c = (at_an_end(torch.randn(size).to(BF16)) for size in ((M, 3), (17, 3), (17,)))
        assert cuda.skinny_refusal(x, W, 3) is None
        cuda.skinny(x, W, h, B, 1.0, c)


def quantise(cuda: ModuleType) -> None:
    for n in (1, 63, 1025, 256 * 64 + 1):
        quantised(at_an_end(torch.randn(n)))


KERNELS = [dequantise, multiply, quantise]


def stays_within(run: Callable[[ModuleType], None], cuda: ModuleType) -> bool:
    """Whether a process of its own outlives the kernels; what they write is at an end too."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            empty = torch.empty
            torch.empty = lambda *size, **options: at_an_end(empty(*size, **options))
            run(cuda)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture(autouse=True)
def _emulated(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("a GPU's memory is guarded by compute-sanitizer")


@pytest.mark.parametrize("run", KERNELS)
def test_nothing_beyond_an_array_is_touched(run: Callable[[ModuleType], None], cuda: ModuleType) -> None:
    assert stays_within(run, cuda)


def test_one_byte_beyond_is_seen(cuda: ModuleType) -> None:
    t = at_an_end(torch.ones(5))

    def read(beyond: int) -> None:
        faulthandler.disable()  # what it would print is no news
        ctypes.string_at(t.data_ptr(), t.nbytes + beyond)

    assert stays_within(lambda _: read(0), cuda)
    assert not stays_within(lambda _: read(1), cuda)
