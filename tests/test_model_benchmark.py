"""bench --model: every row over the same frozen tensors, and no times for a model whose layers are wrong."""

import pytest
import tiny_llama
import tiny_models
import torch
from torch import nn

from lora_kernels.commands import model_step, pretrained
from lora_kernels.commands.bench import model as model_benchmark
from lora_kernels.commands.bench import model_gate
from lora_kernels.commands.bench.peers import ACCELERATED, BARE, BNB, FUSED, OURS, OURS_FUSED, OURS_NF4, PEFT
from lora_kernels.commands.console import CommandError, Output
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.models.blocks import fuse_blocks
from lora_kernels.models.config import LoRAConfig
from lora_kernels.models.surgery import add_lora

pytest.importorskip("transformers")
pytest.importorskip("peft")
CPU = torch.device("cpu")
CONFIG = LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_llama.write(tmp_path_factory.mktemp("model"))


def settings(directory, **changes):
    values = {"tokens": (48,), "ranks": (4,), "dropouts": (0.1,), "dtype": torch.float32, "length": 16}
    return model_benchmark.Settings(directory, **{**values, **changes})


def test_rows_of_a_model(directory, capsys):
    result = model_benchmark.run(settings(directory, dropouts=(0.0, 0.1)), CPU, 2, Output())
    assert result["failures"] == result["peers_not_measured"] == []
    names = [BARE, OURS, OURS_FUSED, PEFT, ACCELERATED[PEFT]]
    assert [row["variant"] for row in result["rows"]] == 2 * names
    for row in result["rows"]:
        assert (row["tokens"], row["sequence_length"]) == (48, 16)
        assert row["tokens_per_s"] == pytest.approx(48 / row["median_s"])
    without, with_dropout = ({row["variant"]: row for row in result["rows"][i : i + 5]} for i in (0, 5))
    assert without[OURS]["saved_bytes"] > without[BARE]["saved_bytes"]
    assert with_dropout[PEFT]["saved_bytes"] - with_dropout[OURS]["saved_bytes"] > 48 * 32 * 4 * 10
    assert with_dropout[OURS]["saved_bytes"] - without[OURS]["saved_bytes"] < 14 * 64
    assert with_dropout[PEFT]["peak_bytes"] > with_dropout[OURS]["peak_bytes"]
    assert with_dropout[OURS]["held_bytes"] >= with_dropout[OURS]["saved_bytes"]
    for rows in (without, with_dropout):
        assert rows[ACCELERATED[PEFT]]["saved_bytes"] == rows[OURS_FUSED]["saved_bytes"] < 0.82 * rows[OURS]["saved_bytes"]
        for row in rows.values():
            over = {name: row["saved_bytes"] / rows[name]["saved_bytes"] for name in (BARE, PEFT)}
            assert row["saved_over"] == pytest.approx(over)
        assert [name for name, row in rows.items() if row["blocks"]] == [OURS_FUSED]
        assert set(rows[OURS_FUSED]["blocks"]["calls"]) == {"fused"}
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "fused blocks: 2 × {q_proj,k_proj,v_proj}, 2 MLPs" in printed


def test_the_twins_share_every_frozen_tensor_and_have_the_same_loss(directory):
    model = pretrained.load_model(directory, torch.float32, CPU)
    ids = model_step.random_ids(model, 32, 16, seed=0)
    twins = (model_step.frozen_twin(model), model_step.ours(model, CONFIG), model_step.peft_twin(model, CONFIG))
    frozen = {parameter.data_ptr() for parameter in model.parameters()}
    losses = []
    for twin in twins:
        assert {p.data_ptr() for p in twin.parameters() if not p.requires_grad} == frozen
        losses.append(model_step.loss(twin.eval(), ids).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) == pytest.approx(losses[2], rel=1e-6)
    model_step.step(twins[0], ids)()  # there is a gradient to compute although nothing is trained


def test_a_model_in_4_bits_beside_bitsandbytes_under_peft(directory):
    pytest.importorskip("bitsandbytes")
    result = model_benchmark.run(settings(directory, quantize="nf4"), CPU, 1, Output())
    assert result["failures"] == result["peers_not_measured"] == []
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == [BARE, OURS_NF4, OURS_NF4 + FUSED, BNB, ACCELERATED[BNB]]
    assert rows[OURS_NF4 + FUSED]["saved_bytes"] < rows[OURS_NF4]["saved_bytes"]
    assert rows[OURS_NF4]["saved_bytes"] < rows[BNB]["saved_bytes"]
    assert set(rows[OURS_NF4]["faster_than"]) == {BNB}


def test_over_4_bits_the_peer_is_in_4_bits_where_ours_is():
    """GPT-2's linear layers are Conv1D, which store their weight the other way round."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_models.gpt2().eval()
    mine, peer = (make(model, CONFIG, "nf4").eval() for make in (model_step.ours, model_step.peft_twin))
    packed = [module for module in peer.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    shapes = [tuple(layer.matrix.shape) for layer in mine.modules() if isinstance(layer, LoRALinear)]
    assert [(module.out_features, module.in_features) for module in packed] == shapes
    assert len(shapes) == 2 * 4
    ids = model_step.random_ids(model, 32, 16, seed=0)
    dense, *found = (twin(input_ids=ids).logits for twin in (model, mine, peer))
    assert (found[0] - dense).norm() > 1e-2 * dense.norm()
    assert (found[0] - found[1]).norm() < 0.1 * (found[0] - dense).norm()


def test_a_model_that_peft_does_not_adapt_is_measured_without_it(tmp_path, capsys):
    """Experts in one parameter, which PEFT adapts only without dropout."""
    tiny_models.mixtral().save_pretrained(tmp_path)
    result = model_benchmark.run(settings(tmp_path, dropouts=(0.1, 0.0)), CPU, 1, Output())
    assert [(row["p"], row["variant"]) for row in result["rows"]] == [
        (0.1, BARE), (0.1, OURS), (0.1, OURS_FUSED),
        (0.0, BARE), (0.0, OURS), (0.0, OURS_FUSED), (0.0, PEFT), (0.0, ACCELERATED[PEFT]),
    ]  # fmt: skip
    (refusal,) = result["peers_not_measured"]
    assert (refusal["peer"], "p=0.1" in refusal["case"]) == ("peft", True)
    assert "does not work with lora_dropout != 0" in refusal["reason"]
    assert "peer not measured: peft (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cases", "first"), [("linear", "lora_kernels 64→64: "), ("members", "lora_kernels, fused blocks q 64→64 k 64→")]
)
def test_a_wrong_layer_or_block_gets_no_times(directory, monkeypatch, cases, first):
    monkeypatch.setattr(getattr(model_gate, cases), "wrong", lambda problem: ["y: norm error 1"])
    result = model_benchmark.run(settings(directory), CPU, 1, Output(), compare=())
    assert result["rows"] == []
    assert result["failures"][0]["reason"].startswith(first)
    assert result["failures"][0]["reason"].endswith("y: norm error 1")


class HalvedMLP(nn.Module):
    """Gate and up are the halves of one layer, as in Phi-3."""

    def __init__(self):
        super().__init__()
        self.gate_up, self.down = nn.Linear(12, 40), nn.Linear(20, 12, bias=False)

    def forward(self, x):
        e, u = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(e) * u)


def test_every_kind_of_block_has_a_case_of_its_sizes():
    """Of a GPT-2, whose MLP has no gate, and a model whose gate and up are one layer; plain members stay plain."""
    about = {"M": 8, "p": 0.1}
    for model, targets, members in (
        (tiny_models.gpt2(), ["c_fc"], {"up": 4, "down": None}),
        (HalvedMLP(), ["gate_up"], {"gate": 4, "up": 4, "down": None}),
    ):
        add_lora(model, LoRAConfig(r=4, target_modules=targets))
        fuse_blocks(model)
        found = list(model_gate.block_cases(model, None, about))
        assert found
        for case in found:
            assert {name: layer.R for name, (_, layer) in case.layers().items()} == members
            assert case.N == case.K
            problem = case.draw()
            assert model_gate.members.wrong(problem) == []


def test_other_peers_are_listed_with_a_reason(directory):
    result = model_benchmark.run(settings(directory), CPU, 1, Output(), compare=("bnb",))
    assert {row["variant"] for row in result["rows"]} == {BARE, OURS, OURS_FUSED}
    assert result["peers_not_measured"] == [{"peer": "bnb", "case": "all", "reason": model_benchmark.OTHERS}]


@pytest.mark.parametrize(("name", "value"), [("tokens", (1,)), ("sequence_length", 1)])
def test_impossible_settings_are_refused(directory, name, value):
    field = {"sequence_length": "length"}.get(name, name)
    with pytest.raises(CommandError, match=f"--{name.replace('_', '-')}: got 1, expected at least 2"):
        settings(directory, **{field: value}).check()


def test_over_4_bits_peft_and_bnb_are_the_same_peer(directory):
    pytest.importorskip("bitsandbytes")
    result = model_benchmark.run(settings(directory, quantize="nf4"), CPU, 1, Output(), compare=("bnb",))
    assert [row["variant"] for row in result["rows"]] == [BARE, OURS_NF4, OURS_NF4 + FUSED, BNB, ACCELERATED[BNB]]
    assert result["peers_not_measured"] == []
