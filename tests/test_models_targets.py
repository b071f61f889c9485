"""Which modules a LoRAConfig means, as in PEFT, and what is reported or refused."""

import math
import re

import numpy as np
import pytest
import torch
from model_case import QV, Model
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, load_adapter, lora_parameters, lora_state_dict, save_adapter
from lora_kernels.models.names import Patterns


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


PATHS = [
    f"{prefix}{layer}.{name}"
    for prefix in ("", "model.", "model.language_model.")
    for layer in ("layers.0", "layers.11", "encoder.h.1", "mlp.experts.1")
    for name in ("q_proj", "v_proj", "mlp.experts.1.w1", "proj", "input_layernorm", "norm")
]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "w1"]},
        {"target_modules": ["proj", "layers.11.q_proj"], "exclude_modules": ["layers.0.proj"]},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.1.*"},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "w1"], "layers_to_transform": [0, 11]},
        {"target_modules": ["q_proj", "model.layers.11.q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": ["h", "experts"]},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_every_path_means_what_it_means_in_peft(options):
    """target_modules, layers_to_transform, layers_pattern, exclude_modules and modules_to_save over paths of many shapes."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    model = nn.Module()
    for path in PATHS:
        *owners, name = path.split(".")
        owner = model
        for part in owners:
            owner = owner._modules.setdefault(part, nn.Module())
        owner.register_module(name, nn.Linear(2, 2))
    config = LoraConfig(**options)
    theirs = [path for path in PATHS if check_target_module_exists(config, path)]
    whole = {path for path in PATHS for name in options.get("modules_to_save", ()) if path.endswith(name)}  # peft.utils.other
    if not theirs:
        with pytest.raises(ValueError, match="matches no linear layer"):
            add_lora(model, LoRAConfig(**options))
        return
    report = add_lora(model, LoRAConfig(**options))
    assert sorted(report.adapted) == sorted(theirs)
    assert {name.partition(".modules_to_save")[0] for name in lora_state_dict(model) if "modules_to_save" in name} == whole


def test_patterns_that_are_looked_up_mean_what_they_mean_as_regexes():
    """PEFT's expression, in the patterns' order; a point stands for any character, and an escaped one for itself."""
    names = ["q_proj", "11.q_proj", "1.q_proj", "layers.0.v_proj", "layers_0.v_proj", "model.layers.11.proj", "proj", "", "oj"]
    regexes = [".*", r"layers\.\d+\.norm", "(q|v)_proj", "^q_proj", "q.proj", "layers.11", ".roj", "...", r"h\.1", "1.w1$"]
    patterns = [*names, *regexes, *map(re.escape, names), "q_proj"]
    for path in [*PATHS, "layersx0.q_proj", "q-proj", "a-b.q_proj", "layers.0xv_proj"]:
        for some in (patterns, patterns[::-1], regexes):
            expected = [pattern for pattern in some if re.match(rf"(.*\.)?({pattern})$", path)]
            assert list(Patterns(some).matching(path)) == expected, path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": "q.*", "layers_to_transform": [0]}, "layers_to_transform: got .* with target_modules 'q"),
        ({"layers_to_transform": 3}, "layers_to_transform: got 3 with target_modules 'all-linear', expected a list"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern: got 'h' without layers_to_transform"),
    ],
)
def test_layers_that_peft_refuses_as_well(options, words):
    from peft import LoraConfig

    with pytest.raises(ValueError, match=words):
        LoRAConfig(**options)
    with pytest.raises(ValueError, match="layers_"):
        LoraConfig(**{"target_modules": "all-linear", **options})


def test_a_file_with_some_layers_in_both_directions(tmp_path):
    import adapter_case
    from peft import PeftModel

    options = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    theirs = adapter_case.peft_adapter(tmp_path / "theirs", **options)
    ours = adapter_case.model()
    load_adapter(ours, tmp_path / "theirs")
    adapter_case.close(ours(adapter_case.IDS), theirs(adapter_case.IDS))
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(adapter_case.model(), tmp_path / "ours").eval()
    adapter_case.close(again(adapter_case.IDS), theirs(adapter_case.IDS))


def test_all_linear_in_any_case():
    assert add_lora(Model(), LoRAConfig(target_modules="All-Linear")).adapted == add_lora(Model(), LoRAConfig()).adapted


def test_output_head_and_other_layers_are_reported():
    model = Model(tie=False)
    model.attention = nn.MultiheadAttention(8, 2)
    model.blocks[0].out.forward = lambda x: x
    model.blocks[1].out.weight.data = model.blocks[1].out.weight.data.to(torch.float8_e4m3fn)
    report = add_lora(model, LoRAConfig())
    assert 'the output head, which "all-linear" leaves out' in report.skipped["lm_head"]
    assert "nn.MultiheadAttention reads its weight and does not call it" in report.skipped["attention.out_proj"]
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
        *(
            ({name: value}, TypeError, f"{name}: got {value!r}, expected ".replace("[", r"\["))
            for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "layers_to_transform")
            for value in (5.0, [None], {"q": 1})
        ),
        ({"target_modules": ["q"], "layers_to_transform": "0"}, TypeError, "layers_to_transform: got '0', expected layer numb"),
        ({"target_modules": ["q"], "layers_to_transform": [True]}, TypeError, r"layers_to_transform: got \[True\]"),
        *(
            ({name: value}, TypeError, rf"{name}: got .*, expected \{{name or regex: value\}}")
            for name in ("rank_pattern", "alpha_pattern")
            for value in (["q"], None)
        ),
        ({"rank_pattern": {"(": 1}}, ValueError, r"rank_pattern: got '\(', expected a name or a valid regex"),
        ({"alpha_pattern": {"(": 1}}, ValueError, r"alpha_pattern: got '\(', expected a name or a valid regex"),
        (
            {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": ["h", "("]},
            ValueError,
            r"layers_pattern: got '\(', expected a name or a valid regex",
        ),
        *(({name: np.True_}, TypeError, f"{name}: got .*True") for name in ("use_rslora", "lora_bias", "init_lora_weights")),
    ],
)
def test_bad_configs(options, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**options)


@pytest.mark.parametrize("kind", [set, frozenset, tuple, list])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_names_in_any_collection_are_saved(field, kind, tmp_path):
    names = ["norm", "lm_head"] if field == "modules_to_save" else ["q_proj", "out"]
    config = LoRAConfig(**{"target_modules": ["v_proj"], field: kind(names)})
    assert getattr(config, field) == (sorted(names) if kind in (set, frozenset) else names)
    model = Model(tie=False)
    add_lora(model, config)
    save_adapter(model, tmp_path)
    load_adapter(Model(tie=False), tmp_path)


def test_the_caller_s_config_stays_the_caller_s(tmp_path):
    config, model = LoRAConfig(r=2, target_modules=["q_proj"], rank_pattern={"0.q_proj": 3}), Model()
    add_lora(model, config)
    config.r, config.rank_pattern["0.q_proj"] = 16, 5
    config.target_modules.append("v_proj")
    save_adapter(model, tmp_path)
    fresh = Model()
    loaded = load_adapter(fresh, tmp_path)
    assert loaded.adapted == {"blocks.0.q_proj": 3, "blocks.1.q_proj": 2}
    loaded.config.r = 16
    save_adapter(fresh, tmp_path / "again")


def test_a_single_layer_cannot_be_exchanged():
    with pytest.raises(ValueError, match=r"model: got a single Linear.*use from_linear"):
        add_lora(nn.Linear(3, 4), LoRAConfig())
