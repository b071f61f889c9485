"""save_adapter and load_adapter: PEFT reads what is written here and the reverse."""

import copy
import os

import pytest
import torch
from adapter_case import CONFIG, IDS, WEIGHTS, Block, close, fill, model, own_adapter, peft_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_kernels import load_adapter, lora_state_dict, save_adapter, set_adapter

CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj", "fc"], "fan_in_fan_out": True},
    {"target_modules": r"layers\.1\..*proj"},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.q_proj"]},
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 3, "layers.1.q_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    {"target_modules": ["q_proj"], "use_rslora": True},
    {"target_modules": ["q_proj"], "lora_bias": True},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Setting `save_embedding", "ignore:Could not identify")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT's own, for its lora_bias
@pytest.mark.parametrize("options", CASES, ids=str)
def test_from_peft_and_back(tmp_path, options, recwarn):
    theirs = peft_adapter(tmp_path / "theirs", **options)
    ours = model()
    load_adapter(ours, tmp_path / "theirs")
    close(ours(IDS), theirs(IDS))
    assert not torch.equal(ours(IDS), model()(IDS))
    save_adapter(ours, tmp_path / "ours")
    written, saved = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    extra = {
        key
        for key in saved
        if "original_module" in key or "modules_to_save" in key or key.endswith("lm_head.base_layer.weight")
    }
    assert written.keys() == saved.keys() - extra
    assert all(torch.equal(written[key], saved[key]) for key in written)
    recwarn.clear()
    again = PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    assert torch.equal(again(IDS), theirs(IDS))


@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj"]])
def test_an_adapter_made_here_is_peft_s(tmp_path, target_modules):
    ours = own_adapter(target_modules=target_modules)
    save_adapter(ours, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    close(PeftModel.from_pretrained(model(), tmp_path).eval()(IDS), ours(IDS))


def test_a_layer_that_add_lora_left_alone_is_left_alone_by_peft(tmp_path):
    class Special(nn.Linear):
        pass

    base = model()
    base.layers[0].q_proj.__class__ = Special
    ours = own_adapter(base=base, target_modules=["q_proj", "v_proj"])
    save_adapter(ours, tmp_path)
    loaded = PeftModel.from_pretrained(model(), tmp_path).eval()
    close(loaded(IDS), ours(IDS))
    assert type(loaded.base_model.model.layers[0].q_proj) is nn.Linear


def test_peft_adapts_inside_a_module_that_modules_to_save_means_by_the_end_of_a_word(tmp_path):
    """add_lora does not, and what it writes says so to PEFT."""
    base = model()
    base.layers[0].input_norm = Block()
    options = {"target_modules": ["q_proj"], "modules_to_save": ["put_norm"]}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    assert [name for name, _ in theirs.named_parameters() if "input_norm.modules_to_save.default.q_proj.lora_A" in name]
    ours = own_adapter(base=copy.deepcopy(base), **options)
    assert type(ours.layers[0].input_norm.q_proj) is nn.Linear
    save_adapter(ours, tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert not [name for name, _ in loaded.named_parameters() if "input_norm" in name and "lora_" in name]
    close(loaded(IDS), ours(IDS))


def test_several_adapters_lie_in_subfolders_as_in_peft(tmp_path):
    ours = own_adapter()
    own_adapter("sql", ours, r=2)
    for name in ("default", "sql"):
        save_adapter(ours, tmp_path, name)
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, "sql"]
    theirs = PeftModel.from_pretrained(model(), tmp_path).eval()
    theirs.load_adapter(tmp_path / "sql", "sql")
    again = model()
    for name in ("default", "sql"):
        load_adapter(again, tmp_path, name)
        for each in (ours, again):
            set_adapter(each, name)
        theirs.set_adapter(name)
        close(ours(IDS), theirs(IDS))
        assert torch.equal(again(IDS), ours(IDS))
    theirs.save_pretrained(tmp_path / "both")
    last = model()
    load_adapter(last, tmp_path / "both", "sql")
    close(last(IDS), theirs(IDS))


def test_loading_into_an_adapter_that_is_there_takes_its_values(tmp_path):
    ours = own_adapter()
    save_adapter(ours, tmp_path)
    other = own_adapter()
    parameters = [p for p in other.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), ours(IDS))
    assert all(a is b for a, b in zip(parameters, [p for p in other.parameters() if p.requires_grad], strict=True))


def test_a_16_bit_base_gets_float32_adapters(tmp_path):
    save_adapter(own_adapter(), tmp_path)
    narrow = model().bfloat16()
    load_adapter(narrow, tmp_path)
    assert narrow.layers[0].q_proj.lora_A["default"].dtype == torch.float32
    narrow = model().bfloat16()
    load_adapter(narrow, tmp_path, autocast_adapter_dtype=False)
    assert narrow.layers[0].q_proj.lora_A["default"].dtype == torch.bfloat16


def test_a_failed_write_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    ours = own_adapter()
    save_adapter(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fill(ours.parameters())
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_adapter(ours, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_wrapped_models_are_looked_into(tmp_path):
    ours = own_adapter()
    save_adapter(torch.compile(ours, backend="eager"), tmp_path)
    fresh = model()
    load_adapter(torch.compile(fresh, backend="eager"), tmp_path)
    for key, value in lora_state_dict(ours).items():
        assert torch.equal(lora_state_dict(fresh)[key], value)


def test_saving_does_not_tie_the_file_to_the_model(tmp_path):
    ours = own_adapter(modules_to_save=["lm_head"])
    twin = copy.deepcopy(ours)
    save_adapter(ours, tmp_path)
    fill(ours.parameters())
    load_adapter(ours, tmp_path)
    for key, value in lora_state_dict(twin).items():
        assert torch.equal(lora_state_dict(ours)[key], value)


def test_what_is_returned_says_where_and_what(tmp_path):
    ours = own_adapter(modules_to_save=["lm_head"], rank_pattern={"v_proj": 2})
    own_adapter("sql", ours)
    assert save_adapter(ours, str(tmp_path)) == tmp_path
    assert save_adapter(ours, tmp_path, "sql") == tmp_path / "sql"
    fresh = model()
    first, second = load_adapter(fresh, str(tmp_path)), load_adapter(fresh, tmp_path, "sql")
    assert (first.adapter, first.directory, first.active) == ("default", tmp_path, True)
    assert first.adapted == {f"layers.{i}.{name}": r for i in range(2) for name, r in (("q_proj", 4), ("v_proj", 2))}
    assert set(first.tensors) == load_file(tmp_path / WEIGHTS).keys()
    assert first.config.modules_to_save == ["lm_head"]
    assert str(first) == f"adapter 'default' from {tmp_path}: 4 LoRA layers, r = 2, 4\n  whole: lm_head.weight"
    assert (second.directory, second.active, second.config.r) == (tmp_path / "sql", False, 4)
    assert str(second).endswith("r = 4; not active: call set_adapter(model, 'sql')")
    assert load_adapter(fresh, tmp_path).adapted == first.adapted
