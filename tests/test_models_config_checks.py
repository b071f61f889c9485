"""Names, patterns and layer numbers of a LoRAConfig that mean nothing in the model: a warning, or an error if all do not."""

import warnings

import pytest
from adapter_case import model as files_model
from adapter_case import peft_adapter
from model_case import QV, Model, snapshot
from torch import nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter

FIELDS = {  # field -> (what is there, what is not, a regex for the message's end)
    "target_modules": (["q_proj", "v_proj"], ["q_porj"], r"no linear layer of Model; near names: \['q_proj'"),
    "exclude_modules": (["v_proj"], ["blocks.2.v_proj"], r"no linear layer of Model; near names: \['blocks.1.v_proj'"),
    "rank_pattern": ({"q_proj": 2}, {r".*\.q_porj": 3}, r"no adapted layer of Model; near names: \['q_proj'"),
    "alpha_pattern": ({"0.q_proj": 2}, {"out": 3}, r"no adapted layer of Model; adapted layers here: \['q_proj', 'v_proj'\]"),
    "modules_to_save": (["lm_head"], ["classifier"], r"no module of Model; "),
    "layers_to_transform": ([0], [2], r"no adapted layer of Model; "),
    "layers_pattern": (["blocks"], ["layers"], r"no numbered module of Model; numbered modules here: \['blocks'\]"),
}


def config(field, value):
    pattern = {"layers_pattern": "blocks", "layers_to_transform": [1]} if field.startswith("layers") else {}
    return LoRAConfig(**{**QV, **pattern, field: value})


def both(a, b):
    return {**a, **b} if isinstance(a, dict) else [*a, *b]


@pytest.mark.parametrize("field", FIELDS)
def test_a_part_that_matches_nothing_is_a_warning(field):
    there, lost, end = FIELDS[field]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = add_lora(Model(), config(field, there))
    with pytest.warns(UserWarning, match=rf"^{field}: .* matches {end}") as caught:
        report = add_lora(Model(), config(field, both(there, lost)))
    assert [repr(*lost) in str(warning.message) for warning in caught] == [True]
    assert caught[0].filename == __file__, "the caller's line"
    assert report == plain


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_matches_nothing_is_an_error_before_anything_changes(field):
    _, lost, end = FIELDS[field]
    model = Model()
    before = snapshot(model)
    message = rf"{field}: .* matches {end}"
    if field == "target_modules":
        message = r"target_modules: .* matches no linear layer of Model"
    elif field == "layers_to_transform":
        message = r"layers_to_transform: \[2\] matches no linear layer that .*\['q_proj', 'v_proj'\] of Model.*: \[0, 1\]$"
    elif field == "layers_pattern":
        message = r"layers_pattern: \['layers'\] stands before no number in .*'blocks.0.q_proj'; expected \['blocks'\]$"
    with pytest.raises(ValueError, match=message):
        add_lora(model, config(field, lost))
    assert snapshot(model).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_to_transform_of_a_model_without_numbers():
    model = nn.ModuleDict({"a": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"layers_to_transform: got 0, but no number .* of ModuleDict, such as 'a.q_proj'"):
        add_lora(model, LoRAConfig(target_modules=["q_proj"], layers_to_transform=0))


def test_every_lost_part_is_named():
    with pytest.warns(UserWarning, match="matches no") as caught:
        add_lora(Model(), LoRAConfig(target_modules=["q_proj", "w1", "w3"], rank_pattern={"q_proj": 2, "k_proj": 3}))
    assert [str(warning.message).split(" matches")[0] for warning in caught] == [
        "target_modules: 'w1'",
        "target_modules: 'w3'",
        "rank_pattern: 'k_proj'",
    ]
    with pytest.raises(ValueError, match=r"rank_pattern: 'k_proj' .*; alpha_pattern: 'out' matches no adapted layer"):
        add_lora(Model(), LoRAConfig(**QV, rank_pattern={"k_proj": 3}, alpha_pattern={"out": 2}))


@pytest.mark.parametrize("regex", [r".*\.blocks\.7.*", "v_proj"])
def test_a_regex_that_excludes_nothing(regex):
    with pytest.raises(ValueError, match=r"exclude_modules: .* matches no linear layer of Model"):
        add_lora(Model(), LoRAConfig(exclude_modules=regex))


def test_a_module_around_others_excludes_nothing():
    """As in PEFT: a name means the module itself."""
    with pytest.raises(
        ValueError, match=r"'blocks.0' matches no linear layer of Model; it is a module around .*'\.\*blocks\.0\.\*'"
    ):
        add_lora(Model(), LoRAConfig(exclude_modules=["blocks.0"]))


def test_names_that_are_skipped_or_the_head_s_are_there():
    model = Model()
    model.conv = nn.Conv1d(2, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = add_lora(model, LoRAConfig(target_modules=["q_proj", "conv", "blocks"], exclude_modules=["lm_head"]))
    assert set(report.skipped) == {"conv", "blocks"}


def test_a_file_of_peft_s_is_read_without_warnings(tmp_path):
    """Its tensors are checked one by one, and PEFT lists names that the model may not have, as those of a task's head."""
    options = {
        "target_modules": ["q_proj", "k_proj"],
        "modules_to_save": ["classifier", "lm_head"],
        "rank_pattern": {"k_proj": 2},
    }
    peft_adapter(tmp_path, **options)
    model = files_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
        save_adapter(model, tmp_path / "again")
        load_adapter(files_model(), tmp_path / "again")
