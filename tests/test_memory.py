"""lora-kernels memory: byte counts against arithmetic by hand and against a real training step."""

import pytest
import torch
from torch import nn

from lora_kernels.commands.console import CommandError, Output
from lora_kernels.commands.layer_shapes import Layers, group_layers, parse_shape, parse_shapes
from lora_kernels.commands.measure import saved_bytes
from lora_kernels.commands.memory.footprints import SIZES, Between, between, footprints
from lora_kernels.commands.memory.run import run
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.models.blocks import fuse_blocks
from lora_kernels.models.config import LoRAConfig
from lora_kernels.models.parameters import lora_parameters
from lora_kernels.models.surgery import add_lora

BF16, FP32 = torch.bfloat16, torch.float32


def test_shapes_are_parsed_with_a_count_of_one_by_default():
    assert parse_shapes(["4096x14336:32", "64x32"], rank=8) == [Layers(4096, 14336, 32, 8), Layers(64, 32, 1, 8)]


@pytest.mark.parametrize("text", ["4096", "4096x", "ax4", "4x4:0", "0x4", "-4x4", "4x4:2:2", "4x4 ", "999999999999x4"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(CommandError, match=r"--shape: got .* expected KxN or KxN:COUNT"):
        parse_shapes([text], rank=1)


@pytest.mark.parametrize("text", ["4x4:3", "4x", "0x4", "4x999999999"])
def test_one_layer_has_no_count(text):
    assert parse_shape("4096x14336") == (4096, 14336)
    with pytest.raises(CommandError, match=r"--shape: got .* expected KxN, positive"):
        parse_shape(text)


def test_footprints_by_hand():
    layers = [Layers(K=100, N=50, count=3, R=4)]
    found = footprints(layers, base_parameters=15_000, M=10, dropout=True, dtype=BF16, adapter_dtype=FP32)
    qlora, lora, full = found["qlora"], found["lora"], found["full"]
    nf4 = 2500 + 79 + 4 + 1024 + 4  # codes, 8-bit absmax, one absmax of those, the map, the offset
    assert qlora.weights == 3 * nf4
    assert (qlora.adapters, qlora.saved_activations, qlora.optimizer) == (7_200, 504, 14_400)
    assert lora.trainable_parameters == 3 * 4 * 150
    assert (lora.weights, lora.adapters, lora.gradients, lora.optimizer) == (30_000, 7_200, 7_200, 14_400)
    assert lora.saved_activations == 3 * (10 * 4 * 4 + 8)
    assert lora.total == 30_000 + 7_200 + 504 + 7_200 + 14_400
    assert (full.weights, full.adapters, full.saved_activations) == (30_000, 0, 0)
    assert (full.gradients, full.optimizer, full.total) == (30_000, 60_000, 120_000)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_counts_are_those_of_a_real_step(p):
    M, layer = 40, nn.Linear(64, 48, bias=False)
    model = nn.Sequential(layer)
    add_lora(model, LoRAConfig(r=4, lora_dropout=p, target_modules=["0"]))
    x = torch.randn(M, 64, requires_grad=True)
    layers = group_layers(model)
    assert layers == [Layers(64, 48, 1, 4)]
    lora = footprints(layers, layer.weight.numel(), M, p > 0, FP32, FP32)["lora"]
    assert saved_bytes(lambda: model(x), exclude=[x]) == lora.saved_activations

    model(x).sum().backward()
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    assert sum(p.numel() for p in parameters) == lora.trainable_parameters
    assert sum(p.grad.nbytes for p in parameters) == lora.gradients
    assert sum(t.nbytes for t in moments) == lora.optimizer


class MLP(nn.Module):
    """With a gate, or without."""

    def __init__(self, gated, act=nn.functional.silu):
        super().__init__()
        self.up_proj, self.down_proj, self.act_fn = nn.Linear(24, 40), nn.Linear(40, 24), act
        self.gate_proj = nn.Linear(24, 40) if gated else None

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up if self.gate_proj else self.act_fn(up))


@pytest.mark.parametrize("gated", [True, False])
def test_what_mlps_keep_is_that_of_a_real_step(gated):
    model, x = nn.Sequential(MLP(gated), MLP(gated)).requires_grad_(False), torch.randn(7, 24, requires_grad=True)
    with_one_input = model[0]  # the second MLP's is the first one's result
    found = {"frozen": saved_bytes(lambda: with_one_input(x), exclude=[x])}
    add_lora(model, LoRAConfig(r=2))
    assert between(model) == (Between(gated=80) if gated else Between(plain=80))
    h = (3 if gated else 2) * 7 * 2 * 4
    found["alone"] = saved_bytes(lambda: with_one_input(x), exclude=[x]) - h
    fuse_blocks(model)
    found["fused"] = saved_bytes(lambda: with_one_input(x), exclude=[x]) - h
    assert {kind: 2 * saved for kind, saved in found.items()} == between(model).saved_bytes(7, 4)


def test_a_size_s_mlps():
    assert SIZES["8b"].between.saved_bytes(8192, 2)["frozen"] == 3 * 32 * 8192 * 14336 * 2
    result = run([Layers(8, 8, 1, 2)], 64, 4, 0.1, BF16, FP32, Output(), Between(gated=16, plain=4))
    assert result["saved_between_mlp_layers"] == {"frozen": 8 * 52, "alone": 8 * 72, "fused": 8 * 36}


def test_equal_layers_are_grouped():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    add_lora(model, LoRAConfig(r=2, target_modules=["0", "1", "2"], rank_pattern={"1": 4}))
    assert group_layers(model) == [Layers(8, 8, 1, 2), Layers(8, 8, 1, 4), Layers(8, 4, 1, 2)]


def test_run_prints_the_totals_and_returns_them(capsys):
    result = run([Layers(1024, 1024, 2, 8)], 2 * 1024**2, 128, 0.0, FP32, FP32, Output())
    printed = capsys.readouterr().out
    assert result["full"]["total"] == 4 * 8 * 1024**2
    assert "32.0 MiB" in printed
    assert "1024 → 1024" in printed
    assert "it is not counted" in printed


def held(model):
    """Bytes of a model's parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("size", "parameters"), [("7b", 6_738_415_616), ("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_sizes_are_what_their_layers_take(size, parameters):
    """A Llama of that size without values: its tensors' bytes, before and after add_lora in 16 and in 4 bits."""
    shape = SIZES[size]
    assert shape.parameters == parameters
    groups = shape.adapted(16)
    found = footprints(groups, parameters, 8192, True, BF16, FP32)

    def build():
        layers = [nn.Linear(g.K, g.N, bias=False, device="meta", dtype=BF16) for g in groups for _ in range(g.count)]
        rest = parameters - sum(g.parameters for g in groups)
        return nn.ModuleDict({"adapted": nn.ModuleList(layers), "rest": nn.Embedding(rest, 1, device="meta", dtype=BF16)})

    assert held(build()) == found["full"].weights
    for kind, quantize in (("lora", None), ("qlora", "nf4")):
        model = build()
        add_lora(model, LoRAConfig(r=16), quantize=quantize)
        assert held(model) == found[kind].weights + found[kind].adapters
    assert found["qlora"].weights < 0.45 * found["lora"].weights


def test_a_quantised_layer_allocates_what_is_counted():
    """The memory that is really taken for a 4-bit layer with values and its adapters, beside the dense one it is made from."""
    dense = nn.Linear(1024, 768, bias=False, dtype=BF16)
    found = footprints([Layers(1024, 768, 1, 8)], 1024 * 768, 1, False, BF16, FP32)["qlora"]
    layer = quantized(dense)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*layer.parameters(), *layer.buffers())}
    assert sum(storages.values()) == pytest.approx(found.weights + found.adapters, rel=0.02)


def quantized(dense):
    layer = LoRALinear.from_linear(dense, quantize="nf4", r=None)
    layer.add_adapter("default", 8, 8, dtype=FP32)
    return layer
