"""The mask by PyTorch operations in a graph for a GPU: what inductor makes of its counters, on a CPU that it takes for one."""

import concurrent.futures
import multiprocessing
import re

import pytest
import torch

from lora_kernels import mask


def arange(start: int, stop: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, stop, device=device)


def gpu_kernels() -> list[str]:
    """The Triton code that inductor writes for Philox's first product of counters, by mask.numbers and by an arange."""
    from torch._inductor import async_compile, config
    from triton.runtime import driver
    from triton_offline import PretendedDriver

    written: list[str] = []

    def write(self, name, code, **options):
        written.append(code)
        raise NotImplementedError("written")  # it would be compiled for a GPU

    driver.set_active(PretendedDriver(90))
    config.cpu_backend, config.force_disable_caches = "triton", True
    async_compile.AsyncCompile.triton = write
    for make in (mask.numbers, arange):

        def high_half(seed: torch.Tensor, make=make) -> torch.Tensor:
            return make(0, 5, seed.device) * mask.PHILOX_M0 >> 32 ^ seed

        torch._dynamo.reset()
        with pytest.raises(Exception, match="written"):
            torch.compile(high_half, fullgraph=True)(torch.tensor(5))
    return written


def test_no_index_is_multiplied_beyond_its_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        codes = pool.submit(gpu_kernels).result()
    assert all(str(mask.PHILOX_M0) in code for code in codes)
    refused = [re.search(rf"\b{mask.PHILOX_M0}\*x\d", code) is not None for code in codes]  # out of range for int32
    assert refused == [False, True]
