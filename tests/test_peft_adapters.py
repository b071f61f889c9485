"""save_adapter and load_adapter: PEFT reads what is written here and the reverse; what does not fit changes nothing."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import (
    LoRAConfig,
    add_lora,
    load_adapter,
    lora_state_dict,
    merge_lora,
    save_adapter,
    set_adapter,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.fc = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), Conv1D(8, 6)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.fc(torch.tanh(self.v_proj(self.q_proj(x)))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
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


def model():
    torch.manual_seed(1)
    return Model().eval()


def fill(parameters):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3)


def peft_adapter(directory, **options):
    """A PeftModel with random adapters, saved in `directory`."""
    adapted = get_peft_model(model(), LoraConfig(r=4, **options)).eval()
    fill(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(directory, save_embedding_layers="lm_head" in options["target_modules"])
    return adapted


def own_adapter(adapter_name="default", base=None, **options):
    base = model() if base is None else base
    add_lora(base, LoRAConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}), adapter_name)
    set_adapter(base, adapter_name)
    fill(parameter for parameter in base.parameters() if parameter.requires_grad)
    return base


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


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


# ---- what does not fit changes nothing ----


def change_config(**values):
    def change(directory):
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **values}))

    return change


def change_weights(function):
    def change(directory):
        tensors = load_file(directory / WEIGHTS)
        save_file({k: v.contiguous().clone() for k, v in function(tensors).items()}, directory / WEIGHTS, {"format": "pt"})

    return change


def cut_off(name):
    def change(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) * 2 // 3])

    return change


def rename_to_bin(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
DAMAGES = [
    (
        change_weights(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}),
        "begin with 'base_model.model.'",
    ),
    (change_weights(lambda t: {k: v for k, v in t.items() if k != KEY}), f"missing 1 of 8, such as '{KEY}'"),
    (change_weights(lambda t: {**t, KEY.replace("lora_A", "lora_C"): t[KEY]}), "unknown .*lora_C.*near: .*lora_"),
    (change_weights(lambda t: {**t, KEY: t[KEY].T}), r"has shape \(8, 4\), expected \(4, 8\)"),
    (change_weights(lambda t: {**t, KEY: t[KEY].int()}), "has dtype torch.int32"),
    (change_weights(lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(11, 8)}), "another base weight"),
    (change_weights(lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()}), "missing 8 of 8"),
    (change_weights(lambda t: {}), "expected keys that begin with"),
    (change_config(r=8), r"has shape \(4, 8\), expected \(8, 8\)"),
    (change_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which rewrote the base weight"),
    (change_config(init_lora_weights="olora"), "rewrote the base weight"),
    (change_config(use_dora=True), "use_dora is True, which has no counterpart here"),
    (change_config(peft_type="IA3"), "peft_type is 'IA3'"),
    (change_config(target_modules=["nothing"]), "matches no linear layer"),
    (change_config(target_modules=None), "target_modules is missing"),
    (change_config(r=0), "r: got 0"),
    (change_config(a_new_field={"x": 1}), "a_new_field"),
    (cut_off(CONFIG), "not JSON, or cut off"),
    (cut_off(WEIGHTS), "no safetensors file, or cut off"),
    (rename_to_bin, "adapter_model.bin is a pickle"),
]


# An adapter that is there is compared by its tensors and scaling; where the file's names would go is not asked.
ONLY_NEW = ("has shape \\(4, 8\\), expected \\(8, 8\\)", "matches no linear layer")


@pytest.mark.parametrize(
    ("damage", "message", "existing"),
    [(damage, message, existing) for damage, message in DAMAGES for existing in (False, True)[: 1 + (message not in ONLY_NEW)]],
)
def test_a_clear_error_and_nothing_has_changed(tmp_path, damage, message, existing):
    save_adapter(own_adapter(), tmp_path)
    target = own_adapter() if existing else model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    types, flags = [type(m) for m in target.modules()], [p.requires_grad for p in target.parameters()]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(target, tmp_path)
    assert [type(m) for m in target.modules()] == types
    assert [p.requires_grad for p in target.parameters()] == flags
    assert target.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_adapter(model(), tmp_path / "nowhere")


def test_an_adapter_that_scales_otherwise_does_not_go_into_one_that_is_there(tmp_path):
    save_adapter(own_adapter(lora_alpha=16), tmp_path)
    with pytest.raises(ValueError, match=r"scales layers\.0\.q_proj by 4, but this model's adapter 'default' by 2"):
        load_adapter(own_adapter(lora_alpha=8), tmp_path)


def test_loading_into_a_merged_model_is_an_error(tmp_path):
    ours = own_adapter()
    save_adapter(ours, tmp_path)
    merge_lora(ours)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        load_adapter(ours, tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: add_lora(m, LoRAConfig(init_lora_weights="pissa", target_modules=["q_proj"], r=2)),
            ValueError,
            "rewrote the base",
        ),
        (lambda m: None, KeyError, "not found"),
        (lambda m: setattr(own_adapter(base=m).layers[0].q_proj.adapters["default"], "scaling", 9.0), ValueError, "scaling 9"),
    ],
    ids=["pissa", "no adapter", "scaling"],
)
def test_what_the_format_cannot_say_is_not_written(tmp_path, change, error, message):
    ours = model()
    change(ours)
    with pytest.raises(error, match=message):
        save_adapter(ours, tmp_path / "new")
    assert not (tmp_path / "new").exists()


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
