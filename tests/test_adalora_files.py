"""AdaLoRA in files: PEFT's ADALORA both ways, and the plain LoRA that compact_ranks makes; configurations; the warning."""

import copy
import json
import warnings

import pytest
import torch
from adalora_case import SETTINGS, Pair, X, close, model, own, peft, trained
from adapter_case import CONFIG, WEIGHTS
from peft import AdaLoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRALinear,
    RankAllocator,
    add_lora,
    add_weighted_adapter,
    compact_ranks,
    delete_adapter,
    load_adapter,
    merge_lora,
    save_adapter,
    set_adapter,
)
from lora_kernels.models.adapter_config import from_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Adapter 'default'.*invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern"),
]


@pytest.fixture(scope="module")
def pair():
    """After a run at whose end a layer has no rank left."""
    made = Pair(target_r=1)
    for number in range(20):
        made.step(number)
    assert 0 in made.allocator.ranks().values()
    return made


@pytest.fixture
def ours(pair):
    return copy.deepcopy(pair.ours).eval()


def read(directory):
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)


def test_ours_is_peft_s_file_and_peft_loads_it(pair, ours, tmp_path):
    save_adapter(ours, tmp_path / "ours")
    pair.theirs.save_pretrained(tmp_path / "theirs")
    (config, tensors), (peft_config, expected) = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert config["rank_pattern"] == peft_config["rank_pattern"]
    differing = {key for key in config.keys() & peft_config.keys() if config[key] != peft_config[key]}
    assert differing <= {"target_modules", "base_model_name_or_path", "fan_in_fan_out", "init_lora_weights"}
    loaded = PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
    close(loaded(X), pair.theirs.eval()(X))
    close(loaded(X), ours(X))


def test_we_load_peft_s_and_write_the_same_again(pair, tmp_path):
    pair.theirs.save_pretrained(tmp_path / "theirs")
    loaded = model()
    load_adapter(loaded, tmp_path / "theirs")
    close(loaded.eval()(X), pair.theirs.eval()(X))
    assert loaded.up.lora_E["default"].shape == (4, 1), "pruned triplets are there, as zeros"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its ranks were decided
        save_adapter(loaded, tmp_path / "again")
    (config, tensors), (first, expected) = read(tmp_path / "again"), read(tmp_path / "theirs")
    assert config["rank_pattern"] == first["rank_pattern"]
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    allocator = RankAllocator(loaded)
    allocator.step(SETTINGS["total_step"])  # goes on from the file's final ranks
    assert allocator.ranks() == pair.ranks()
    load_adapter(present := own(target_r=1), tmp_path / "theirs")
    close(present.eval()(X), loaded(X))


def test_before_the_ranks_are_final_a_file_holds_every_triplet(tmp_path):
    pair = Pair()
    for number in range(9):
        pair.step(number)
    assert 0 < sum(pair.allocator.ranks().values()) < 12
    save_adapter(pair.ours, tmp_path)
    config, tensors = read(tmp_path)
    assert config["rank_pattern"] is None
    assert tensors["base_model.model.down.lora_A"].shape == (4, 10)
    close(PeftModel.from_pretrained(model(), tmp_path).eval()(X), pair.theirs.eval()(X))
    loaded = model()
    load_adapter(loaded, tmp_path)
    for name, parameter in trained(pair.ours).items():
        assert torch.equal(trained(loaded)[name], parameter)


def test_a_triplet_that_momentum_has_moved_is_in_the_file(ours, tmp_path):
    with torch.no_grad():
        for E in (layer.lora_E["default"] for layer in ours.modules() if isinstance(layer, LoRALinear)):
            E[0] += 0.5
    save_adapter(ours, tmp_path)
    close(PeftModel.from_pretrained(model(), tmp_path).eval()(X), ours(X))


def test_over_nf4_and_under_another_name(tmp_path):
    made = model()
    config = AdaLoRAConfig(**{**SETTINGS, "init_lora_weights": False})
    add_lora(made, config, "sql", quantize="nf4")
    save_adapter(made, tmp_path, "sql")
    loaded = model()
    load_adapter(loaded, tmp_path, "sql", quantize="nf4")
    assert torch.equal(loaded(X), made(X))
    assert loaded.up.quantized
    compact_ranks(loaded)
    close(loaded(X), made(X))


# ---- compact_ranks ----


def test_compacting_gives_a_plain_lora_that_peft_loads(pair, ours, tmp_path):
    y, ranks = ours(X), pair.allocator.ranks()
    assert compact_ranks(ours) == ranks
    close(ours(X), y)
    left = {path: r for path, r in ranks.items() if r}
    found = {path: layer.lora_A["default"].shape[0] for path, layer in ours.named_children() if layer.adapters}
    assert found == left
    assert not [name for name, _ in ours.named_parameters() if "lora_E" in name]
    assert all(p.requires_grad == ("lora_" in name) for name, p in ours.named_parameters())
    save_adapter(ours, tmp_path)
    config, tensors = read(tmp_path)
    assert config["peft_type"] == "LORA"
    assert len(tensors) == 2 * len(left)
    loaded = PeftModel.from_pretrained(model(), tmp_path).eval()
    close(loaded(X), y)
    load_adapter(again := model(), tmp_path)
    close(again.eval()(X), y)
    merge_lora(ours)
    close(ours(X), y)
    with pytest.raises(ValueError, match="its active adapter is 'default', expected one of AdaLoRA"):
        compact_ranks(again)


def test_a_trained_bias_keeps_its_layer(tmp_path):
    made = own(bias="lora_only", target_modules=["up", "down"]).eval()
    with torch.no_grad():
        made.down.lora_E["default"][1] = 0.7
        made.up.bias += 1
    y = made(X)
    assert compact_ranks(made) == {"up": 1, "down": 1}
    close(made(X), y)
    save_adapter(made, tmp_path)
    close(PeftModel.from_pretrained(model(), tmp_path).eval()(X), y)


def test_what_cannot_be_compacted(ours):
    with pytest.raises(ValueError, match="got no singular value that is not zero, expected a trained adapter"):
        compact_ranks(own())
    merge_lora(ours)
    with pytest.raises(RuntimeError, match="cannot compact ranks: the model is merged"):
        compact_ranks(ours)


def test_adapters_of_both_kinds_are_combined(ours):
    add_lora(ours, LoRAConfig(r=3, target_modules=["up", "down", "out"], init_lora_weights=False), "lora")
    add_weighted_adapter(ours, ["default", "lora"], [0.5, 0.25], "mix", "cat")
    deltas = {}
    for name in ("default", "lora", "mix"):
        set_adapter(ours, name)
        term = ours.down.active_term
        deltas[name] = float(term.scaling) * term.B @ term.A
    close(deltas["mix"], 0.5 * deltas["default"] + 0.25 * deltas["lora"])
    delete_adapter(ours, "default")
    assert "lora_E.default" not in ours.down.state_dict()


# ---- the user who decides no rank ----


def test_saving_what_was_trained_without_an_allocator_warns(tmp_path):
    made = own()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(made, tmp_path)  # untrained
    with torch.no_grad():
        made.up.lora_E["default"] += 1
    with pytest.warns(UserWarning, match=r"no RankAllocator has decided its ranks.*RankAllocator\(model\)\.step") as caught:
        save_adapter(made, tmp_path)
    assert caught[0].filename == __file__


# ---- configurations ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 16}, "r: got 16, expected none: AdaLoRA begins with init_r"),
        ({"init_r": 0}, "init_r: got 0, expected an integer of at least 1"),
        ({"target_r": 2.5}, "target_r: got 2.5, expected an integer"),
        ({"deltaT": 0}, "deltaT: got 0, expected an integer of at least 1"),
        ({"tinit": -1}, "tinit: got -1"),
        ({"tfinal": True}, "tfinal: got True"),
        ({"total_step": 0}, "total_step: got 0, expected an integer of at least 1"),
        ({"tinit": 16}, "tinit: got 16, expected less than total_step − tfinal = 16"),
        ({"beta1": 1.0}, "beta1: got 1.0, expected a number between 0 and 1"),
        ({"beta2": "0.5"}, "beta2: got '0.5'"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight: got -0.1, expected a finite number of at least 0"),
        ({"rank_pattern": {"up": 2}}, "rank_pattern: got"),
        ({"alpha_pattern": {"up": 2}}, "alpha_pattern: got"),
        ({"use_rslora": True}, "use_rslora: got True, expected False for AdaLoRA"),
        ({"lora_bias": True}, "lora_bias: got True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', expected True or False"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        AdaLoRAConfig(**{**SETTINGS, **options})


def test_peft_s_configuration_and_its_defaults():
    defaults, own_defaults = AdaLoraConfig(total_step=1), AdaLoRAConfig(total_step=1)
    for name in ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "r"):
        assert getattr(defaults, name) == getattr(own_defaults, name), name
    theirs = AdaLoraConfig(**SETTINGS, use_rslora=True, rank_pattern={"up.lora_E": [True]})
    assert from_config(theirs, model()) == AdaLoRAConfig(**SETTINGS)
    made = model()
    assert add_lora(made, theirs).adapted == {"up": 4, "down": 4, "out": 4}
    assert made.up.adapters["default"].scaling == pytest.approx(8 / (4 + 1e-5), rel=1e-12)


def test_a_file_needs_the_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"total_step: got None for adapter 'default'.*compact_ranks\(model\)"):
        save_adapter(own(total_step=None), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config, tensors: config.update(rank_pattern=[1]), r"rank_pattern is \[1\], expected an object"),
        (lambda config, tensors: config["rank_pattern"].update({"up.lora_E": [1, 0]}), "rank_pattern has 'up.lora_E'"),
        (lambda config, tensors: config["rank_pattern"].update({"up": [True]}), "rank_pattern has 'up'"),
        (
            lambda config, tensors: config["rank_pattern"].update({"down.lora_E": [True] * 9}),
            "has 9 values for .*, expected init_r = 4",
        ),
        (lambda config, tensors: tensors.pop("base_model.model.down.lora_E"), "missing 1 of 9, such as .*down.lora_E"),
        (lambda config, tensors: config.update(total_step=3, tfinal=3), "tinit: got 3, expected less than"),
    ],
)
def test_damaged_files_change_nothing(pair, tmp_path, change, words):
    pair.theirs.save_pretrained(tmp_path)
    config, tensors = read(tmp_path)
    change(config, tensors)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS)
    made = model()
    with pytest.raises(ValueError, match=words):
        load_adapter(made, tmp_path)
    assert type(made.up) is nn.Linear


def test_an_untrained_adapter_goes_both_ways(tmp_path):
    theirs = peft(init_lora_weights=False).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(made := model(), tmp_path)
    close(made.eval()(X), theirs(X))
