import os

import pytest
import torch
import triton_interpreter
from csrc_emulator import cuda  # noqa: F401

from lora_kernels import cpu_extension, use_backend
from lora_kernels.plan import load

torch.set_num_threads(min(2, torch.get_num_threads()))  # more only fight over a busy machine
if triton_interpreter.DEVICE.type == "cpu":  # Triton's kernels then run in its interpreter, if they are asked for
    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute: LORA_KERNELS_TEST_DEVICE, by default the CPU. Truth is always computed on the CPU."""
    return torch.device(os.environ.get("LORA_KERNELS_TEST_DEVICE", "cpu"))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that "auto" takes wherever it can compute, Triton's interpreter included."""
    if request.param == "torch":
        monkeypatch.setattr(use_backend, "current", "torch")
    else:
        triton = load("triton")
        why_not = triton.why_not

        def why_not_if_asked_for(*tensors: torch.Tensor | None) -> str | None:
            with use_backend("triton"):
                return why_not(*tensors)

        monkeypatch.setattr(triton, "why_not", why_not_if_asked_for)
    return request.param


@pytest.fixture(params=["extension", "operations"])
def cpu_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calling test with csrc/cpu's loops, and with PyTorch's operations in their place."""
    if request.param == "operations":
        monkeypatch.setattr(cpu_extension, "extension", None)
    elif cpu_extension.extension is None:
        pytest.skip(cpu_extension.why_not)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
