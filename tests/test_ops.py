"""The registered operators: opcheck, torch.compile with fullgraph, agreement with eager mode."""

import pytest
import torch
from accuracy import Case, check_compiled
from torch.library import opcheck

from lora_kernels import lora_linear

pytestmark = pytest.mark.usefixtures("backend")
SEED = torch.tensor(7)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(p, dtype, trained, device):
    case = Case(M=(2, 3), dtype=dtype, device=device, needs=tuple("xWABc") if trained else ())
    tensors = case.tensors()
    arguments = [tensors[name] for name in "xWABc"]
    scaling, seed = torch.tensor(0.5, device=device), SEED.to(device) if p else None
    opcheck(torch.ops.lora_kernels.lora_forward, (*arguments, scaling, p, seed, dtype))


@pytest.mark.parametrize("needs", [(True, True, True, True), (True, False, False, False), (False, True, True, False)])
def test_opcheck_backward(needs, device):
    tensors = Case(M=6, dtype=torch.bfloat16, device=device, needs=()).tensors()
    x, W, A, B = (tensors[name] for name in "xWAB")
    dx, dA, dB, _ = needs
    h = torch.randn(6, A.shape[0], device=device).bfloat16()
    optional = (x if dA else None, W if dx else None, A if dx else None, B if dx or dA else None, h if dB else None)
    scaling = torch.tensor(0.5, device=device)
    opcheck(torch.ops.lora_kernels.lora_backward, (tensors["dy"], *optional, scaling, 0.3, SEED.to(device), list(needs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype, device):
    check_compiled(Case(p=0.3, dtype=dtype, device=device, scaling=0.5), Case.tensors)


def test_compiled_with_drawn_seed_tensor_scaling_and_autocast(device):
    torch._dynamo.reset()
    tensors = Case(device=device).tensors()
    scaling = torch.tensor(0.5, device=device)

    @torch.compile(fullgraph=True)
    def compute(x, W, A, B, c):
        with torch.autocast(device.type, torch.bfloat16):
            return lora_linear(x, W, A, B, c, scaling=scaling, dropout_p=0.5)

    first, second = (compute(*(tensors[name] for name in "xWABc")) for _ in range(2))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    first.float().sum().backward()
    assert all(tensors[name].grad.dtype == torch.float32 for name in "xABc")


def test_operator_checks_its_arguments():
    W, A, B = torch.ones(6, 4), torch.ones(2, 4), torch.ones(6, 2)
    with pytest.raises(ValueError, match=r"x: got shape \(3, 5\)"):
        torch.ops.lora_kernels.lora_forward(torch.ones(3, 5), W, A, B, None, torch.tensor(1.0), 0.0, None, torch.float32)
    with pytest.raises(ValueError, match="seed: got None"):
        torch.ops.lora_kernels.lora_forward(torch.ones(3, 4), W, A, B, None, torch.tensor(1.0), 0.5, None, torch.float32)


def test_fake_tensors(device):
    """Shapes and dtypes are known without computing, as torch.export and memory planners need them."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        tensors = Case(M=(2, 3), dtype=torch.bfloat16, device=device).tensors()
        y = lora_linear(*(tensors[name] for name in "xWABc"), dropout_p=0.1, seed=3)
        assert (y.shape, y.dtype) == ((2, 3, 33), torch.bfloat16)
