"""The benchmark's peers compute the same layer: each against float64, and a peer that cannot run says why."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accuracy import violations
from torch import nn
from torch.nn import functional as F

from lora_kernels import NF4Weight
from lora_kernels.cases import glu_mlp, linear_group
from lora_kernels.cases import linear as cases
from lora_kernels.commands.bench import layers, peer_layers, peers
from lora_kernels.commands.bench.blocks import Block, BlockProblem
from lora_kernels.commands.bench.layers import measure_case
from lora_kernels.commands.bench.suites import FORWARD, Shape, Workload
from lora_kernels.commands.console import CommandError

CPU = torch.device("cpu")
SHAPES = [Shape(40, 24), Shape(40, 24, "qkv", 12), Shape(40, 72, "mlp"), Shape(40, 72, "decoder", 12)]


class Plain(nn.Module):
    """y = x·Wᵀ + s·x·Aᵀ·Bᵀ in the dtype of x."""

    def __init__(self, problem, dtype):
        super().__init__()
        self.W = problem.W.to(dtype)
        self.A, self.B = nn.Parameter(problem.A.to(dtype)), nn.Parameter(problem.B.to(dtype))

    def forward(self, x):
        return F.linear(x, self.W) + 2 * F.linear(F.linear(x, self.A), self.B)


def results(module, problem, dtype):
    """Outputs, gradients of the inputs, and of every trained parameter, with A and B in the order of the layers."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in problem.inputs]
    outputs = module(*inputs)
    trained = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(outputs, [*inputs, *trained], [dy.to(dtype) for dy in problem.dys])
    return {str(number): tensor.detach() for number, tensor in enumerate((*outputs, *grads))}


@pytest.mark.parametrize("name", ["ours", "ours-fused", "peft", "unsloth-style"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.block)
def test_a_peer_computes_the_layer(name, shape):
    if name == "peft":
        pytest.importorskip("peft")
    if name == "ours-fused" and shape.block == "linear":
        pytest.skip("one layer is no block")
    problem = BlockProblem.draw(Workload(200, shape, 4, 0.0, torch.float32), CPU, seed=1)
    exact, plain = (
        Block(shape.block, {key: Plain(layer, dtype) for key, layer in problem.layers.items()})
        for dtype in (torch.float64, torch.float32)
    )
    variant = peers.variants(name.removesuffix("-fused"), problem)[name == "ours-fused"]
    found = results(variant.module, problem, torch.float32)
    expected = results(plain, problem, torch.float32), results(exact, problem, torch.float64)
    assert violations(found, *expected, torch.float32) == []


def test_the_unsloth_order_saves_its_inputs_alone_and_the_mlp_recomputes_the_product():
    rows, *_ = measure_case(Workload(64, Shape(40, 24), 4, 0.0, torch.float32), CPU, 1, ("unsloth-style",))
    assert {row["variant"]: row["saved_bytes"] for row in rows}[peers.UNSLOTH] == 0
    rows, *_ = measure_case(Workload(64, Shape(40, 72, "mlp"), 4, 0.0, torch.float32), CPU, 1, ("unsloth-style",))
    assert {row["variant"]: row["saved_bytes"] for row in rows}[peers.UNSLOTH] == 2 * 64 * 72 * 4  # e and g


BLOCK = Workload(48, Shape(40, 72, "decoder", 12), 4, 0.1, torch.bfloat16)


def test_in_a_block_each_row_of_this_package_stands_beside_the_fused_one(monkeypatch):
    monkeypatch.setattr(layers, "host_times", lambda *args: {})  # which take as long as all other rows of this file
    rows, wrong, _ = measure_case(BLOCK, CPU, 1, ())
    assert wrong == []
    by = {row["variant"]: row for row in rows}
    assert list(by) == [peers.BARE, *(name + end for name in (peers.OURS, peers.OURS_FP32) for end in ("", peers.FUSED))]
    gate, h = 48 * 72 * 2, 7 * 48 * 4 * 2  # gate's output in bf16, as up's, act(gate) and their product; h of every layer
    assert by[peers.BARE]["saved_bytes"] == 3 * gate
    assert by[peers.OURS]["saved_bytes"] == 4 * gate + h + 7 * 8
    assert by[peers.OURS_FUSED]["saved_bytes"] == 2 * gate + h + 3 * 8
    assert {row["backend"] for row in rows[1:]} == {"cpu"}
    rows, wrong, _ = measure_case(BLOCK, CPU, 1, (), quantize="nf4")
    assert wrong == []
    assert [row["variant"] for row in rows] == [peers.BARE, peers.OURS_NF4, peers.OURS_NF4 + peers.FUSED]


@pytest.mark.parametrize(("module", "function", "failing"), [
    (linear_group, "lora_linear_group", ", fused blocks: dx"), (glu_mlp, "lora_glu_mlp", ", fused blocks: y"),
])  # fmt: skip
def test_a_wrong_block_gets_no_times(monkeypatch, module, function, failing):
    real = getattr(module, function)

    def broken(x, *members, **options):
        x = x + 0.01 * (x - x.detach())  # a percent more of dx
        found = real(x, *members, **options)
        return found if function == "lora_linear_group" else 1.01 * found

    monkeypatch.setattr(module, function, broken)
    rows, wrong, _ = measure_case(BLOCK, CPU, 1, ())
    assert rows == []
    assert wrong
    assert all(", fused blocks: " in reason for reason in wrong)
    assert any(failing in reason for reason in wrong)


def test_bitsandbytes_is_measured_under_its_own_peft_layer():
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    problem = BlockProblem.draw(Workload(32, Shape(128, 64), 4, 0.1, torch.float32), CPU, seed=1)
    (variant, *_) = peers.variants("bnb", problem)
    assert type(variant.module.layers["linear"]).__name__ == "Linear4bit"
    assert "peft" in type(variant.module.layers["linear"]).__module__
    y = variant.module.eval()(*problem.inputs)[0]
    layer = problem.layers["linear"]
    exact = Plain(layer, torch.float32)(layer.x)
    assert 0.01 < (y - exact).norm() / exact.norm() < 0.2  # four bits: wrong by more than rounding, and by no more than that


def test_beside_bitsandbytes_stands_this_package_in_4_bits_behind_the_gate(monkeypatch):
    pytest.importorskip("bitsandbytes")
    case = Workload(32, Shape(128, 64), 4, 0.1, torch.float32)
    rows, wrong, refusals = measure_case(case, CPU, 1, ("bnb",))
    assert (wrong, refusals) == ([], [])
    assert [row["variant"] for row in rows] == [peers.BARE, peers.OURS, peers.BNB, peers.OURS_NF4]
    assert rows[3]["backend"] == "cpu"
    real = cases.lora_linear
    percent = {NF4Weight: 1.01}  # wrong over 4 bits alone
    monkeypatch.setattr(cases, "lora_linear", lambda x, W, *rest, **o: percent.get(type(W), 1.0) * real(x, W, *rest, **o))
    rows, wrong, _ = measure_case(case, CPU, 1, ("bnb",))
    assert rows == []
    assert all(reason.startswith("lora_kernels, NF4: ") for reason in wrong)


def test_without_dropout_there_is_an_unsloth_row_and_with_it_a_reason():
    with_dropout = Workload(16, Shape(24, 16), 4, 0.1, torch.float32)
    rows, _, refusals = measure_case(with_dropout, CPU, 1, ("unsloth-style",))
    assert peers.UNSLOTH not in {row["variant"] for row in rows}
    assert refusals == [{"peer": "unsloth-style", "case": str(with_dropout), "reason": refusals[0]["reason"]}]
    assert "no dropout" in refusals[0]["reason"]


def test_a_peer_that_raises_is_listed_and_the_others_are_measured(monkeypatch):
    def broken(*args):
        raise ValueError("their kernel\ndoes not like this shape")

    monkeypatch.setattr(peer_layers.unsloth_order, "project", broken)
    case = Workload(16, Shape(24, 16), 4, 0.0, torch.float32)
    rows, wrong, refusals = measure_case(case, CPU, 1, ("unsloth-style",))
    assert [row["variant"] for row in rows] == [peers.BARE, peers.OURS]
    assert wrong == []
    assert refusals[0]["reason"] == "ValueError: their kernel"


def test_the_forward_pass_alone_saves_nothing_and_takes_no_dropout():
    case = Workload(16, Shape(24, 16), 4, 0.5, torch.float32, FORWARD)
    rows, wrong, refusals = measure_case(case, CPU, 1, ("unsloth-style",))
    assert (wrong, refusals) == ([], [])
    assert {row["op"] for row in rows} == {"forward"}
    assert [row["saved_bytes"] for row in rows] == [0, 0, 0]


def test_names_of_peers():
    assert peers.parse("none") == ()
    assert peers.parse("all") == peers.PEERS
    assert peers.parse("peft, bnb") == ("peft", "bnb")
    with pytest.raises(CommandError, match="--compare: got 'pefd', expected none, all"):
        peers.parse("pefd")


def test_why_a_peer_is_not_there(monkeypatch, tmp_path):
    assert "pass --lorafusion DIR" in peers.why_not("lorafusion")
    assert "has no folder lorafusion/ops" in peers.why_not("lorafusion", tmp_path)
    (tmp_path / "lorafusion" / "ops").mkdir(parents=True)
    if not torch.cuda.is_available():
        assert "CUDA" in peers.why_not("lorafusion", Path(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.why_not("bnb") == "not installed; run `pip install peft`"
    assert peers.why_not("unsloth-style") is None
