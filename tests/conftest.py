import os

import pytest
import torch
import triton_interpreter
from csrc_emulator import cuda  # noqa: F401

torch.set_num_threads(min(2, torch.get_num_threads()))  # more only fight over a busy machine
if triton_interpreter.DEVICE.type == "cpu":  # Triton's kernels then run in its interpreter, if they are asked for
    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute: LORA_KERNELS_TEST_DEVICE, by default the CPU. Truth is always computed on the CPU."""
    return torch.device(os.environ.get("LORA_KERNELS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
