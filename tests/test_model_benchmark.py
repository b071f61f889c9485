"""bench --model: every row over the same frozen tensors, and no times for a model whose layers are wrong."""

import pytest
import tiny_llama
import tiny_models
import torch

from lora_kernels.commands import model_step, pretrained
from lora_kernels.commands.bench import model as model_benchmark
from lora_kernels.commands.bench.peers import BARE, BNB, OURS, OURS_NF4, PEFT
from lora_kernels.commands.console import CommandError, Output
from lora_kernels.layers.linear import LoRALinear
from lora_kernels.models.config import LoRAConfig

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
    assert [row["variant"] for row in result["rows"]] == 2 * [BARE, OURS, PEFT]
    for row in result["rows"]:
        assert (row["tokens"], row["sequence_length"]) == (48, 16)
        assert row["tokens_per_s"] == pytest.approx(48 / row["median_s"])
    without, with_dropout = ({row["variant"]: row for row in result["rows"][i : i + 3]} for i in (0, 3))
    assert without[OURS]["saved_bytes"] > without[BARE]["saved_bytes"]
    assert with_dropout[PEFT]["saved_bytes"] - with_dropout[OURS]["saved_bytes"] > 48 * 32 * 4 * 10
    assert with_dropout[OURS]["saved_bytes"] - without[OURS]["saved_bytes"] < 14 * 64
    assert with_dropout[PEFT]["peak_bytes"] > with_dropout[OURS]["peak_bytes"]
    assert with_dropout[OURS]["held_bytes"] >= with_dropout[OURS]["saved_bytes"]
    assert "tokens/s" in capsys.readouterr().out


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
    assert list(rows) == [BARE, OURS_NF4, BNB]
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
        (0.1, BARE), (0.1, OURS), (0.0, BARE), (0.0, OURS), (0.0, PEFT)
    ]  # fmt: skip
    (refusal,) = result["peers_not_measured"]
    assert (refusal["peer"], "p=0.1" in refusal["case"]) == ("peft", True)
    assert "does not work with lora_dropout != 0" in refusal["reason"]
    assert "peer not measured: peft (" in capsys.readouterr().out


def test_a_wrong_layer_gets_no_times(directory, monkeypatch):
    monkeypatch.setattr(model_benchmark, "wrong_results", lambda problem: ["y: norm error 1"])
    result = model_benchmark.run(settings(directory), CPU, 1, Output(), compare=())
    assert result["rows"] == []
    assert "y: norm error 1" in result["failures"][0]["reason"]


def test_other_peers_are_listed_with_a_reason(directory):
    result = model_benchmark.run(settings(directory), CPU, 1, Output(), compare=("bnb",))
    assert {row["variant"] for row in result["rows"]} == {BARE, OURS}
    assert result["peers_not_measured"] == [{"peer": "bnb", "case": "all", "reason": model_benchmark.OTHERS}]


@pytest.mark.parametrize(("name", "value"), [("tokens", (1,)), ("sequence_length", 1)])
def test_impossible_settings_are_refused(directory, name, value):
    field = {"sequence_length": "length"}.get(name, name)
    with pytest.raises(CommandError, match=f"--{name.replace('_', '-')}: got 1, expected at least 2"):
        settings(directory, **{field: value}).check()


def test_over_4_bits_peft_and_bnb_are_the_same_peer(directory):
    pytest.importorskip("bitsandbytes")
    result = model_benchmark.run(settings(directory, quantize="nf4"), CPU, 1, Output(), compare=("bnb",))
    assert [row["variant"] for row in result["rows"]] == [BARE, OURS_NF4, BNB]
    assert result["peers_not_measured"] == []
