"""The mask by PyTorch operations in a graph for a GPU: what inductor makes of its counters, on a CPU that it takes for one."""

import concurrent.futures
import multiprocessing
import re

import pytest
import torch

from lora_kernels import mask


def arange(start: int, stop: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, stop, device=device)


def gpu_kernel(numbers: str) -> str:
    """The Triton code that inductor writes for Philox's first product of counters, which `numbers` makes."""
    from torch._inductor import async_compile, config
    from triton.runtime import driver
    from triton_offline import PretendedDriver

    make, written = {"arange": arange, "numbers": mask.numbers}[numbers], []

    def write(self, name, code, **options):
        written.append(code)
        raise NotImplementedError("written")  # it would be compiled for a GPU

    def high_half(seed: torch.Tensor) -> torch.Tensor:
        return make(0, 5, seed.device) * mask.PHILOX_M0 >> 32 ^ seed

    driver.set_active(PretendedDriver(90))
    config.cpu_backend, config.force_disable_caches = "triton", True
    async_compile.AsyncCompile.triton = write
    with pytest.raises(Exception, match="written"):
        torch.compile(high_half, fullgraph=True)(torch.tensor(5))
    return written[0]


@pytest.mark.parametrize(("numbers", "refused"), [("numbers", False), ("arange", True)])
def test_no_index_is_multiplied_beyond_its_32_bits(numbers: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        code = pool.submit(gpu_kernel, numbers).result()
    assert str(mask.PHILOX_M0) in code
    assert bool(re.search(rf"\b{mask.PHILOX_M0}\*x\d", code)) == refused  # Triton: the scalar is out of range for int32
