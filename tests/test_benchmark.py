"""The benchmark: its arithmetic, its table's raw rows, and that a wrong kernel gets no speed."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from lora_kernels.cases import linear as cases
from lora_kernels.cases.linear import Case, truth, wrong
from lora_kernels.commands.bench import layers as benchmark
from lora_kernels.commands.bench.layers import measure_case
from lora_kernels.commands.bench.peers import BARE, BNB, OURS, OURS_FP32, OURS_NF4, PEFT, PEFT_FP32
from lora_kernels.commands.bench.suites import FORWARD, LLAMA_8B, SUITES, Shape, Workload, choose_suite
from lora_kernels.commands.console import Output
from lora_kernels.mask import dropout_mask

CPU = torch.device("cpu")


def problem(dtype=torch.float32, p=0.25, adapters=None):
    case = Case(33, 40, 24, 4, p, bias=False, dtype=dtype, adapter_dtype=adapters, needs=("x", "A", "B"), seed=5)
    return case.draw(torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_accepts_the_kernels(dtype, p):
    assert wrong(problem(dtype, p)) == []
    assert wrong(problem(dtype, p, adapters=torch.float32)) == []
    assert wrong(problem(dtype, p).with_adapters(torch.float32)) == []
    assert wrong(problem(dtype, p).quantized()) == []


def test_truth_is_what_autograd_gives_in_float64():
    small = problem(torch.float64, p=0.5)
    keep = dropout_mask(33, 40, 0.5, seed=5)
    x, A, B = (t.detach().clone().requires_grad_() for t in (small.x, small.A, small.B))
    y = x @ small.W.T + 2.0 * ((x * keep * 2) @ A.T @ B.T)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), small.dy)
    expected = {"y": y.detach(), "dx": dx, "dA": dA, "dB": dB}
    found = truth(small)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def broken(scale_y=1.0, gradient=None, seed_offset=0):
    """lora_linear with one defect."""

    def function(x, W, A, B, c, *, seed, **options):
        y = real(x, W, A, B, c, seed=seed + seed_offset, **options) * scale_y
        tensor = {"dx": x, "dA": A, "dB": B}.get(gradient)
        if tensor is not None:
            y = y + 0.01 * (tensor.sum() - tensor.sum().detach())  # the value of y stays, one gradient changes
        return y

    real = cases.lora_linear
    return function


@pytest.mark.parametrize(
    ("defect", "failing"),
    [
        ({"scale_y": 1.01}, "y:"),
        ({"scale_y": float("nan")}, "y:"),
        ({"gradient": "dx"}, "dx:"),
        ({"gradient": "dA"}, "dA:"),
        ({"gradient": "dB"}, "dB:"),
        ({"seed_offset": 1}, "dA:"),  # another dropout mask
    ],
)
def test_gate_refuses_a_defect_and_names_what_is_wrong(monkeypatch, defect, failing):
    monkeypatch.setattr(cases, "lora_linear", broken(**defect))
    assert any(reason.startswith(failing) for reason in wrong(problem()))


def test_a_wrong_result_gets_no_times(monkeypatch, capsys):
    monkeypatch.setattr(cases, "lora_linear", broken(scale_y=1.01))
    suite = choose_suite("small", CPU, shapes=(Shape(32, 16),), tokens=(8,), ranks=(2,))
    result = benchmark.run(suite, CPU, repeats=1, output=Output())
    assert result["rows"] == []
    assert "lora_kernels: y: norm error" in result["failures"][0]["reason"]
    assert "the correctness gate failed" in capsys.readouterr().out


def test_truth_is_computed_once_for_variants_over_the_same_weight(monkeypatch):
    calls = []
    monkeypatch.setattr(cases, "truth", lambda problem: calls.append(problem) or truth(problem))
    rows, failed, _ = measure_case(Workload(16, Shape(24, 16), R=4, p=0.1, dtype=torch.bfloat16), CPU, 1, ())
    assert {row["variant"] for row in rows} == {BARE, OURS, OURS_FP32}
    assert not failed
    assert len(calls) == 1


def test_rows_hold_every_variant_with_consistent_ratios():
    pytest.importorskip("peft")
    case = Workload(64, Shape(48, 32), R=4, p=0.1, dtype=torch.bfloat16)
    rows, failed, refusals = measure_case(case, CPU, repeats=3)
    assert (failed, refusals) == ([], [])
    by_name = {row["variant"]: row for row in rows}
    assert list(by_name) == [BARE, OURS, OURS_FP32, PEFT, PEFT_FP32]
    assert by_name[BARE]["times_bare"] == 1.0
    assert by_name[PEFT]["faster_than"][PEFT] == 1.0
    for row in rows:
        assert set(row["faster_than"]) == {PEFT, PEFT_FP32}
        assert row["faster_than"][PEFT] == pytest.approx(by_name[PEFT]["median_us"] / row["median_us"])
        assert row["gbs"] == pytest.approx(case.bytes() / row["median_us"] * 1e-3)
        assert (row["launches"], row["cuda_graph"]) == (None, False)
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["times_bare"] == pytest.approx(row["median_us"] / by_name[BARE]["median_us"])
        assert row["tflops"] == pytest.approx(case.flops(row["variant"] != BARE) / row["median_us"] * 1e-6)
    assert by_name[OURS]["backend"] == "cpu"
    assert by_name[PEFT]["backend"] is None


def test_saved_bytes_are_h_and_a_seed_while_peft_saves_tensors_of_the_size_of_x():
    pytest.importorskip("peft")
    case = Workload(64, Shape(48, 32), R=4, p=0.1, dtype=torch.float32)
    rows, *_ = measure_case(case, CPU, repeats=1)
    saved = {row["variant"]: row["saved_bytes"] for row in rows}
    assert saved[BARE] == 0
    assert saved[OURS] == 64 * 4 * 4 + 8
    assert saved[PEFT] >= 64 * 48 * 4  # at least the dropped x


def test_without_peft_its_rows_are_missing_and_the_reason_is_given(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    suite = choose_suite("small", CPU, shapes=(Shape(32, 16),), tokens=(8,), ranks=(2,))
    result = benchmark.run(suite, CPU, repeats=1, output=Output())
    assert {row["variant"] for row in result["rows"]} == {BARE, OURS}
    assert all(row["faster_than"] == {} for row in result["rows"])
    (refusal,) = result["peers_not_measured"]
    assert (refusal["peer"], refusal["case"]) == ("peft", "all")
    assert "not installed" in refusal["reason"]


def test_what_was_measured_is_in_the_file_when_a_later_case_does_not_end(monkeypatch, tmp_path):
    real = benchmark.measure_case

    def interrupted(case, *args):
        if case.M == 9:
            raise KeyboardInterrupt
        return real(case, *args)

    monkeypatch.setattr(benchmark, "measure_case", interrupted)
    suite = choose_suite("small", CPU, shapes=(Shape(32, 16),), tokens=(8, 9), ranks=(2,))
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(suite, CPU, 1, Output(str(tmp_path / "rows.json")), compare=())
    assert {row["M"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == {8}


def test_flops_count_six_low_rank_products():
    case = Workload(10, Shape(7, 5), R=2, p=0.0, dtype=torch.float32)
    assert case.flops(adapted=False) == 2 * 2 * 10 * 7 * 5
    assert case.flops(adapted=True) - case.flops(adapted=False) == 2 * 10 * 2 * 3 * (7 + 5)
    forward = replace(case, passes=FORWARD)
    assert forward.flops(adapted=False) == 2 * 10 * 7 * 5
    assert forward.flops(adapted=True) - forward.flops(adapted=False) == 2 * 10 * 2 * (7 + 5)


def test_bytes_are_those_of_the_frozen_layers():
    case = Workload(10, Shape(7, 5), R=2, p=0.0, dtype=torch.bfloat16)
    assert replace(case, passes=FORWARD).bytes() == 2 * (10 * 7 + 7 * 5 + 10 * 5)
    assert case.bytes() == 2 * replace(case, passes=FORWARD).bytes()


def test_blocks_have_the_layers_of_a_decoder_layer():
    shape = Shape(8, 20, "decoder", kv=4)
    assert list(shape.layers()) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert shape.layers()["v"] == (8, 4)
    assert shape.layers()["down"] == (20, 8)
    linears = sum(Workload(10, Shape(K, N), 2, 0.0, torch.float32).flops(True) for K, N in shape.layers().values())
    assert Workload(10, shape, 2, 0.0, torch.float32).flops(True) == linears


def test_suites_follow_the_device_and_take_other_axes():
    assert choose_suite("auto", CPU) == SUITES["small"]
    assert choose_suite("auto", torch.device("cuda")) == SUITES["llama"]
    cases = list(choose_suite("llama", CPU, tokens=(16, 32), dropouts=(0.5,)).workloads())
    assert len(cases) == 2 * len(LLAMA_8B)
    assert {(case.M, case.p, case.R) for case in cases} == {(16, 0.5, 16), (32, 0.5, 16)}


def test_the_forward_pass_alone_has_no_dropout_to_repeat_a_case_for():
    forward = choose_suite("tokens", CPU, FORWARD)
    assert {case.p for case in forward.workloads()} == {0.0}
    assert 2 * len(list(forward.workloads())) == len(list(choose_suite("tokens", CPU).workloads()))


def test_a_rank_above_the_layer_is_measured():
    """More than W can express, but a layer that PEFT and add_lora make."""
    rows, wrong, _ = measure_case(Workload(16, Shape(24, 16), R=40, p=0.1, dtype=torch.float32), CPU, 1, ())
    assert wrong == []
    assert [row["variant"] for row in rows] == [BARE, OURS]


def test_over_4_bits_alone():
    """--quantize nf4: no dense layer of this package, whatever peers are asked for; PEFT is bitsandbytes' layer under it."""
    pytest.importorskip("bitsandbytes")
    suite = choose_suite("small", CPU, shapes=(Shape(128, 64),), tokens=(8,), ranks=(2,))
    result = benchmark.run(suite, CPU, 1, Output(), ("peft", "bnb", "unsloth-style"), quantize="nf4")
    assert [row["variant"] for row in result["rows"]] == [BARE, OURS_NF4, BNB]
    (refusal,) = result["peers_not_measured"]
    assert refusal == {"peer": "unsloth-style", "case": "all", "reason": "not measured over 4-bit weights; bnb is"}
    assert [row["variant"] for row in benchmark.run(suite, CPU, 1, Output(), (), quantize="nf4")["rows"]] == [BARE, OURS_NF4]
