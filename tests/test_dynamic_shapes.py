"""A new sequence length is no new graph: torch.compile and torch.export keep the sizes of x symbolic."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from lora_kernels import LoRAConfig, accelerate, add_lora

every_model = pytest.mark.parametrize(
    ("kind", "dropout"), [(kind, p) for kind in ("add_lora", "nf4", "accelerate") for p in (0.0, 0.1)]
)


def build(kind, dropout):
    torch.manual_seed(0)
    options = {"r": 4, "lora_dropout": dropout, "target_modules": ["0", "2"], "init_lora_weights": False}
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64))
    if kind == "accelerate":
        model = get_peft_model(model, LoraConfig(**options))
        accelerate(model)
    else:
        add_lora(model, LoRAConfig(**options), quantize="nf4" if kind == "nf4" else None)
    return model


@pytest.mark.parametrize("dynamic", [None, True])
@every_model
def test_sixteen_lengths_are_few_graphs(kind, dropout, dynamic):
    """At most three: the first length, any length, and one for a size of 1."""
    torch._dynamo.reset()
    model, counter = build(kind, dropout), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for length in range(1, 17):
        x = torch.randn(2, length, 64, requires_grad=True)
        torch.manual_seed(length)
        y = compiled(x)
        y.sum().backward()
        torch.manual_seed(length)
        torch.testing.assert_close(y, model(x))
    assert counter.frame_count <= 3


@every_model
def test_sizes_marked_as_dynamic(kind, dropout):
    torch._dynamo.reset()
    model, x = build(kind, dropout), torch.randn(2, 5, 64, requires_grad=True)
    for dimension in (0, 1):
        torch._dynamo.mark_dynamic(x, dimension)  # an error where a size would be fixed
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert x.grad.shape == x.shape


@every_model
@pytest.mark.parametrize("ndim", [2, 3])
def test_export_with_dynamic_sizes(kind, dropout, ndim):
    model = build(kind, dropout).eval()
    sizes = {dimension: Dim(f"size_{dimension}") for dimension in range(ndim - 1)}
    shapes = ((sizes,),) if kind == "accelerate" else (sizes,)
    exported = export(model, (torch.randn(*(3, 5)[: ndim - 1], 64),), dynamic_shapes=shapes).module()
    for first in ((3, 5), (2, 9), (7, 1), (1, 1)):
        x = torch.randn(*first[: ndim - 1], 64)
        torch.testing.assert_close(exported(x), model(x))
