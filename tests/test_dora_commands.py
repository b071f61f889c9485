"""`--variant dora` of the benchmark and the demo: the rows, that they compute DoRA, and one line for what cannot be."""

import json

import pytest
import torch
from accuracy import violations
from test_demo import QUICK, model, run_demo, text  # noqa: F401  (fixtures)

from lora_kernels.backends.cpu import linear as cpu
from lora_kernels.backends.torch import linear
from lora_kernels.cases import linear as cases
from lora_kernels.commands.bench import model as model_benchmark
from lora_kernels.commands.bench import peers
from lora_kernels.commands.bench.blocks import BlockProblem
from lora_kernels.commands.bench.layers import measure_case
from lora_kernels.commands.bench.peers import ACCELERATED, BARE, BNB, LORA, OURS, OURS_FUSED, OURS_NF4, PEFT
from lora_kernels.commands.bench.suites import Shape, Workload, choose_suite
from lora_kernels.commands.console import CommandError, Output
from lora_kernels.operation import prepared

pytest.importorskip("peft")
CPU = torch.device("cpu")
CASE = Workload(17, Shape(64, 24), 4, 0.0, torch.float32, dora=True)


@pytest.mark.parametrize("name", ["ours", "peft"])
def test_a_row_computes_dora(name):
    """Outputs and gradients, the magnitude's too, against float64."""
    block = BlockProblem.draw(CASE, CPU, seed=3)
    problem = block.layers["linear"]
    module = peers.variants(name, block)[0].module
    (y,) = module(problem.x)
    layer = module.layers["linear"]
    of_magnitude = layer.lora_magnitude if name == "ours" else layer.lora_magnitude_vector
    trained = {"A": layer.lora_A["default"], "B": layer.lora_B["default"], "m": of_magnitude["default"]}
    trained = {letter: getattr(owner, "weight", owner) for letter, owner in trained.items()}
    grads = torch.autograd.grad(y, [problem.x, *trained.values()], problem.dy)
    found = {"y": y.detach(), **dict(zip(["dx", *(f"d{letter}" for letter in trained)], grads, strict=True))}
    assert not violations(found, cases.plain(problem), cases.truth(problem), torch.float32)


def test_rows_of_a_layer():
    rows, wrong, refused = measure_case(CASE, CPU, 2, ("peft", "unsloth-style"))
    assert [row["variant"] for row in rows] == [BARE, OURS, OURS + LORA, PEFT]
    assert all(row["dora"] for row in rows)
    assert not wrong
    assert [(refusal["peer"], refusal["reason"]) for refusal in refused] == [("unsloth-style", "it has no DoRA")]
    saved = {row["variant"]: row["saved_bytes"] for row in rows}
    assert saved[OURS] == saved[OURS + LORA] + 4 * (17 * 24 + 24) < saved[PEFT]  # v and n


def test_rows_over_a_4_bit_weight():
    pytest.importorskip("bitsandbytes")
    rows, wrong, _ = measure_case(CASE, CPU, 2, ("peft",), quantize="nf4")
    assert not wrong
    assert [row["variant"] for row in rows] == [BARE, OURS_NF4, OURS_NF4 + LORA, BNB]


def test_wrong_results_have_no_times(monkeypatch):
    steps = linear.STEPS
    for backend in (linear, cpu):
        monkeypatch.setattr(backend, "STEPS", steps._replace(norm=lambda *args: 1.01 * steps.norm(*args)))
    monkeypatch.setattr(prepared, "_kinds", {})
    rows, wrong, _ = measure_case(CASE, CPU, 2, ())
    assert not rows
    assert wrong
    assert all(reason.startswith(f"{OURS}: ") for reason in wrong)


def test_blocks_are_refused():
    with pytest.raises(CommandError, match="--suite: decoder-small times blocks"):
        choose_suite("decoder-small", CPU, dora=True)


def test_rows_of_a_model(model, capsys):  # noqa: F811
    settings = model_benchmark.Settings(model, (48,), (4,), (0.0,), torch.float32, 16, dora=True)
    result = model_benchmark.run(settings, CPU, 2, Output())
    assert not result["failures"], result["failures"]
    assert [row["variant"] for row in result["rows"]] == [BARE, OURS, OURS_FUSED, PEFT, ACCELERATED[PEFT]]
    assert "r=4, p=0.0, float32 DoRA" in capsys.readouterr().out


def test_the_demo(run_demo, model, text, tmp_path):  # noqa: F811
    code, out, err = run_demo("--model", model, "--text", text, *QUICK, "--variant", "dora", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    held_out = list(found["held_out"].values())
    assert held_out[-1] < held_out[0]
    assert found["round_trip"]["logits_bit_equal"] is True
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"] is True


def test_another_variant_is_one_line(run_demo, model, text):  # noqa: F811
    code, out, err = run_demo("--model", model, "--text", text, "--variant", "vera")
    assert (code, out) == (2, "")
    assert err == "lora-kernels: --variant: got vera, expected lora, dora or adalora\n"
