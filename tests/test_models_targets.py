"""Which modules a LoRAConfig means, as in PEFT, and what is reported or refused."""

import math

import pytest
import torch
from model_case import QV, Model
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, lora_parameters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["0.out", "0.q_proj", "0.v_proj", "1.out", "1.q_proj", "1.v_proj"]),
        (QV, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        ({"target_modules": ["blocks.1.out"]}, ["1.out"]),
        ({"target_modules": ["1.out", "0.q_proj"]}, ["0.q_proj", "1.out"]),
        ({"target_modules": r".*\.1\.(q|v)_proj"}, ["1.q_proj", "1.v_proj"]),
        ({"exclude_modules": ["out"]}, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        ({"exclude_modules": r"blocks\.0.*"}, ["1.out", "1.q_proj", "1.v_proj"]),
    ],
)
def test_target_modules(options, expected):
    model = Model()
    report = add_lora(model, LoRAConfig(**options))
    assert sorted(report.adapted) == [f"blocks.{path}" for path in expected]
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == list(report.adapted)


@pytest.mark.parametrize(
    "options",
    [
        {
            "target_modules": ["q_proj", "out"],
            "rank_pattern": {"q_proj": 2, "1.out": 3},
            "alpha_pattern": {r"blocks\.0\..*": 5},
        },
        {"target_modules": r".*(q_proj|out)", "exclude_modules": ["1.out"]},
        {"target_modules": ["proj"], "rank_pattern": {"proj": 4}},
        {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.v_proj": 16}},
    ],
)
def test_matches_what_peft_matches(options):
    peft = pytest.importorskip("peft")
    mine, theirs = Model(), Model()
    try:
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=8, **options)).base_model.model
    except ValueError:
        with pytest.raises(ValueError, match="matches no linear layer"):
            add_lora(mine, LoRAConfig(r=8, lora_alpha=8, **options))
        return
    add_lora(mine, LoRAConfig(r=8, lora_alpha=8, **options))
    expected = {
        n: (m.r["default"], m.scaling["default"]) for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    layers = {n: m.adapters["default"] for n, m in mine.named_modules() if isinstance(m, LoRALinear)}
    assert {n: (a.r, a.scaling) for n, a in layers.items()} == expected


def test_output_head_and_other_layers_are_reported():
    model = Model(tie=False)
    model.attention = nn.MultiheadAttention(8, 2)
    model.blocks[0].out.forward = lambda x: x
    model.blocks[1].out.weight.data = model.blocks[1].out.weight.data.to(torch.float8_e4m3fn)
    report = add_lora(model, LoRAConfig())
    assert 'the output head, which "all-linear" leaves out' in report.skipped["lm_head"]
    assert "a NonDynamicallyQuantizableLinear, not an nn.Linear" in report.skipped["attention.out_proj"]
    assert "forward was replaced on the instance" in report.skipped["blocks.0.out"]
    assert "float8" in report.skipped["blocks.1.out"]
    assert type(model.lm_head) is nn.Linear
    text = str(report)
    assert "4 LoRA layers" in text
    assert "not adapted: lm_head" in text
    assert f"{report.trainable:,} of {report.total:,} parameters" in text
    assert report.trainable == sum(p.numel() for p in lora_parameters(model)) == 2 * (8 * 16 + 8 * 14)
    assert report.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        *(({"r": r}, ValueError, "r: got .*, expected an integer of at least 1") for r in (-1, True, 8.0, "8", None)),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]: got 0"),
        *(
            (options, ValueError, r"(lora_alpha|alpha_pattern\['q'\]): got .*, expected a finite number above 0")
            for alpha in (-4, 0, math.nan, math.inf, "16", None, True)
            for options in ({"lora_alpha": alpha}, {"alpha_pattern": {"q": alpha}})
        ),
        ({"lora_dropout": math.nan}, ValueError, r"lora_dropout: got nan, expected a probability"),
        ({"lora_dropout": "0.1"}, TypeError, r"lora_dropout: got str, expected a float"),
        ({"lora_dropout": 2}, ValueError, r"lora_dropout: got 2, expected a probability in \[0, 1\]"),
        ({"bias": "lora"}, ValueError, "bias: got 'lora'"),
        (
            {"target_modules": "q_proj("},
            ValueError,
            "target_modules: got 'q_proj\\(', expected a list of names or a valid regex",
        ),
        ({"target_modules": []}, ValueError, r"target_modules: got \[\]"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save: got 'lm_head', expected a list"),
    ],
)
def test_bad_configs(options, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**options)


def test_a_single_layer_cannot_be_exchanged():
    with pytest.raises(ValueError, match=r"model: got a single Linear.*use from_linear"):
        add_lora(nn.Linear(3, 4), LoRAConfig())
