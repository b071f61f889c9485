"""Merging an adapter into a layer's weight and taking it out again."""

import pytest
import torch
from accuracy import errors
from kinds import every_dense_kind
from layer_case import DTYPES, dense, layer
from torch import nn

from lora_kernels import LoRALinear

pytestmark = every_dense_kind


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [True, "pissa"])
def test_merge_and_unmerge(kind, dtype, init):
    made = layer(dtype, init_lora_weights=init, trained=False).eval()
    nn.init.normal_(made.lora_B["default"], std=0.1)
    before, parameter = made.weight.clone(), made.weight
    exact = dense(made)
    made.merge()
    assert made.merged
    assert torch.equal(made.weight, exact.to(dtype)) or errors(made.weight, exact)[1] <= torch.finfo(dtype).eps
    x = torch.randn(5, 12, dtype=dtype)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    made.unmerge()
    assert made.weight is parameter
    assert torch.equal(made.weight, before), "unmerging is bit-exact in every dtype"


def test_errors_while_merged(kind):
    made = layer()
    made.merge()
    actions = [made.merge, lambda: made.set_adapter(None), lambda: made.delete_adapter("default"), made.reset_parameters]
    state = {name: torch.zeros_like(value) for name, value in made.state_dict().items()}
    for part in (state, {"bias": state["bias"]}, {"lora_A.default": state["lora_A.default"]}):
        actions += [lambda part=part, assign=assign: made.load_state_dict(part, False, assign) for assign in (False, True)]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for action in actions:
        with pytest.raises(RuntimeError, match=r"LoRALinear is merged; call unmerge\(\) first"):
            action()
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    made.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError, match="merged, so its adapter gets no gradient"):
        made(torch.ones(1, 12))
    with torch.no_grad():
        made(torch.ones(1, 12))
    made.unmerge()
    with pytest.raises(RuntimeError, match="cannot unmerge: LoRALinear is not merged"):
        made.unmerge()
    made.set_adapter(None)
    with pytest.raises(RuntimeError, match="cannot merge: no adapter is active"):
        made.merge()


def test_merging_does_not_write_to_a_shared_weight(kind):
    embedding, head = nn.Embedding(10, 12), nn.Linear(12, 10, bias=False)
    head.weight = embedding.weight
    made = LoRALinear.from_linear(head, r=2, init_lora_weights=False)
    before = embedding.weight.clone()
    made.merge()
    assert torch.equal(embedding.weight, before)
    made.unmerge()
    assert made.weight is embedding.weight


@pytest.mark.parametrize(
    ("init", "quantize"),
    [(init, None) for init in (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")]
    + [(False, "nf4"), ("orthogonal", "nf4")],
)
def test_autocast_changes_no_weight(kind, init, quantize):
    """Initialising and merging within torch.autocast: not a bit of W + s·B·A is computed in 16 bits."""
    made = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            one = LoRALinear.from_linear(nn.Linear(64, 32), r=4, init_lora_weights=init, quantize=quantize)
            one.merge()
        made.append(one)
    assert torch.equal(made[0].lora_A["default"], made[1].lora_A["default"])
    assert torch.equal(made[0].weight, made[1].weight)
