"""lora_grouped_linear and multi_lora_linear over the Triton kernels: segments of any sizes, ranks, dropouts and dtypes."""

import pytest
import torch
from segments_accuracy import SIZES, check
from triton_interpreter import DEVICE

from lora_kernels import use_backend
from lora_kernels.cases.grouped_linear import GroupedCase, MultiCase

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FORMS = {
    "own": (GroupedCase, {}),
    "shared": (GroupedCase, {"own": ()}),
    "shared weight": (GroupedCase, {"own": ("bias",)}),
    "shared bias": (GroupedCase, {"own": ("weight",)}),
    "adapters": (MultiCase, {}),
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def case(form: str, **options):
    kind, own = FORMS[form]
    return kind(**{**own, "M": 17, "device": DEVICE, **options})


@every_form
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_dtypes(form: str, dtype: torch.dtype, p: float) -> None:
    check(case(form, dtype=dtype, p=p))


@every_form
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(form: str, sizes: str) -> None:
    M, of_segments = SIZES[sizes]
    check(case(form, M=M, sizes=of_segments, p=0.3, dtype=FP16, K=70, N=133))
