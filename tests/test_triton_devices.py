"""What depends on the GPU, as another one would take it: its tiles."""

from collections.abc import Iterator

import pytest
import torch
from accuracy import Case, check_contract
from triton_interpreter import DEVICE

from lora_kernels import use_backend
from lora_kernels.backends.triton import tuning
from lora_kernels.plan import changed

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter pretends to be another GPU")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls by Triton are those of a GPU of its family, with few processors."""
    monkeypatch.setattr(tuning, "gpu", lambda device: tuning.Gpu((9, 0), 4))
    changed()
    with use_backend("triton"):
        yield
    changed()


@pytest.mark.parametrize("R", [8, 48])
@pytest.mark.parametrize("adapter", [BF16, FP32])
def test_the_tiles_of_sm_90(adapter: torch.dtype, R: int, an_h100: None) -> None:
    check_contract(Case(M=150, K=600, N=520, R=R, p=0.3, dtype=BF16, adapter_dtype=adapter).draw())
