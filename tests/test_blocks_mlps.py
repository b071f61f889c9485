"""What each call of a fused MLP does: the operation, or the module's own forward and a reason in the counts."""

import copy

import pytest
import torch
from blocks_case import FUSED, MLP, ROWS, Halves, adapted, mlp_results
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora_kernels import fuse_blocks, unfuse_blocks


def silu(m, x):
    return m.last(F.silu(m.first(x)) * m.second(x))


def hooked(m):
    m.last.register_forward_hook(lambda module, args, y: 2 * y)


def replaced(m):
    forward = type(m.last).forward
    m.last.forward = lambda x: -forward(m.last, x)


def exchanged_layer(m):
    torch.manual_seed(9)
    m.second = adapted(nn.Linear(8, 16))


FALLBACKS = {
    "a member has hooks": hooked,
    "a member's forward was replaced on the instance": replaced,
    "an adapter is merged": lambda m: m.first.merge(),
    "no adapted member": lambda m: [layer.set_adapter(None) for layer in (m.first, m.second, m.last)],
    "it was changed: call fuse_blocks again": lambda m: setattr(m, "factor", 0.8),
    "a NormLinear": lambda m: setattr(m, "second", NormLinear(8, 16)),
}


class NormLinear(nn.Linear):
    pass


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_the_operation_cannot_say_the_module_s_own_forward_does(reason):
    model = MLP(silu).eval()
    report = fuse_blocks(model)
    torch.manual_seed(8)
    FALLBACKS[reason](model)
    y = model(ROWS)
    assert report.calls() == {FUSED: 0, reason: 1}
    unfuse_blocks(model)
    assert torch.equal(y, model(ROWS))


def test_exchanged_layers_are_seen():
    model = MLP(silu)
    report = fuse_blocks(model)
    before = model(ROWS)
    exchanged_layer(model)
    y = model(ROWS)
    assert report.calls() == {FUSED: 2}
    unfuse_blocks(model)
    torch.testing.assert_close(y, model(ROWS))
    assert not torch.allclose(y, before)


def test_dropouts_that_differ_global_hooks_and_arguments():
    model = MLP(silu, p=0.25)
    report = fuse_blocks(model)
    model.last.adapters["default"].lora_dropout = 0.5
    model(ROWS)
    model.eval()
    torch.testing.assert_close(model(x=ROWS), model(ROWS))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        model(ROWS)
    finally:
        handle.remove()
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(y=ROWS)
    with pytest.raises(TypeError, match="float32"):
        model(ROWS.double())
    calls = report.calls()
    assert calls.pop(FUSED) == 2
    assert calls == {
        "the members' lora_dropout differ": 1,
        "global module hooks": 1,
        "extra arguments": 1,
        "arguments that do not fit one operation": 1,
    }


@pytest.mark.parametrize("lora", [("first",), ("second", "last"), ("last",)])
def test_plain_layers_among_adapted_ones(lora):
    model = MLP(silu, dtype=torch.float64, lora=lora)
    expected = mlp_results(model, ROWS.double())
    report = fuse_blocks(model)
    for a, b in zip(mlp_results(model, ROWS.double()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert report.calls() == {FUSED: 1}


def test_conv1d_and_4_bit_members():
    model = MLP(silu)
    for name in ("first", "second"):
        model._modules[name] = adapted(Conv1D(16, 8))
    model.last = adapted(nn.Linear(16, 8), quantize="nf4")
    expected = model(ROWS)
    assert fuse_blocks(model).mlps == [""]
    torch.testing.assert_close(model(ROWS), expected)


def test_halves_of_a_4_bit_weight_are_refused():
    model = Halves(lambda m, x: (lambda e, u: m.last(F.silu(e) * u))(*m.first(x).chunk(2, -1)))
    model.first = adapted(nn.Linear(8, 32), quantize="nf4")
    assert "halves of one 4-bit weight" in fuse_blocks(model).skipped[""]


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = MLP(silu)
    assert "meta device" in fuse_blocks(model).skipped[""]


def test_no_rows():
    model = MLP(silu)
    fuse_blocks(model)
    assert model(ROWS[:0]).shape == (0, 3, 8)


def test_a_replica_of_data_parallel_computes_with_its_own_weights():
    model = MLP(silu)
    report = fuse_blocks(model)
    replica = model._replicate_for_data_parallel()
    replica._modules["second"] = copy.deepcopy(model.second)
    replica.second.weight.data.zero_()
    assert not torch.allclose(replica(ROWS), model(ROWS))
    assert report.calls() == {FUSED: 2}
