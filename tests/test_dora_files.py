"""DoRA in files: PEFT's lora_magnitude_vector both ways, over every base; files that do not say what they hold; state dicts."""

import json

import pytest
import torch
from adapter_case import CONFIG, IDS, WEIGHTS, close, model, own_adapter, peft_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    save_adapter,
    save_merged,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
KEY = "base_model.model.layers.0.q_proj.lora_magnitude_vector"
CASES = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj", "fc"], "fan_in_fan_out": True},
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 3, "layers.1.q_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    {"target_modules": ["q_proj"], "use_rslora": True, "lora_dropout": 0.1},
    {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["norm"]},
]


def read(directory):
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)


def write(directory, config, tensors):
    (directory / CONFIG).write_text(json.dumps(config))
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("options", CASES, ids=str)
def test_from_peft_and_back(tmp_path, options, recwarn):
    theirs = peft_adapter(tmp_path / "theirs", use_dora=True, **options)
    load_adapter(ours := model(), tmp_path / "theirs")
    close(ours(IDS), theirs(IDS))
    save_adapter(ours, tmp_path / "ours")
    (config, written), (peft_config, saved) = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert config["use_dora"] is peft_config["use_dora"] is True
    assert KEY in saved
    assert written.keys() == {key for key in saved if "original_module" not in key and "modules_to_save" not in key}
    assert all(torch.equal(written[key], saved[key]) for key in written)
    recwarn.clear()
    again = PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    assert torch.equal(again(IDS), theirs(IDS))


def test_an_adapter_made_here_is_peft_s(tmp_path):
    ours = own_adapter(use_dora=True, target_modules="all-linear")
    assert (ours(IDS) - model()(IDS)).abs().max() > 0.01
    save_adapter(ours, tmp_path)
    close(PeftModel.from_pretrained(model(), tmp_path).eval()(IDS), ours(IDS))


@pytest.mark.parametrize("double_quant", [True, False])
def test_over_4_bits_that_bitsandbytes_quantised(tmp_path, double_quant):
    bnb = pytest.importorskip("bitsandbytes")

    def base():
        torch.manual_seed(0)
        made = nn.Sequential(bnb.nn.Linear4bit(64, 96, quant_type="nf4", compress_statistics=double_quant)).to("cpu").train()
        made.is_loaded_in_4bit = True
        return made

    theirs = get_peft_model(base(), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=True))
    theirs.base_model.model[0].lora_magnitude_vector["default"].weight.data.mul_(torch.rand(96) + 0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours := base(), tmp_path / "theirs")
    x = torch.randn(5, 64)
    close(ours(x), theirs(x))
    save_adapter(ours, tmp_path / "ours")
    (_, written), (_, saved) = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert written.keys() == saved.keys()
    assert all(torch.equal(written[key], saved[key]) for key in saved)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "ours")(x), theirs(x))


def test_the_key_of_peft_s_modules_is_read_too(tmp_path):
    """diffusers and inject_adapter_in_model write "….lora_magnitude_vector.weight"."""
    theirs = peft_adapter(tmp_path, use_dora=True, target_modules=["q_proj", "v_proj"])
    config, tensors = read(tmp_path)
    named = {f"{key}.weight" if key.endswith("magnitude_vector") else key: t for key, t in tensors.items()}
    assert named.keys() != tensors.keys()
    write(tmp_path, config, named)
    load_adapter(ours := model(), tmp_path)
    close(ours(IDS), theirs(IDS))


def test_a_peft_config_says_it_and_both_begin_alike():
    torch.manual_seed(0)
    options = LoraConfig(use_dora=True, target_modules=["q_proj", "fc"], init_lora_weights=False)
    theirs, ours = get_peft_model(model(), options), model()
    add_lora(ours, options)
    assert ours.layers[0].q_proj.adapters["default"].use_dora
    names = [name for name, _ in ours.named_modules() if isinstance(ours.get_submodule(name), LoRALinear)]
    assert len(names) == 4
    for name in names:
        own, peft = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        A, B = (getattr(peft, kind)["default"].weight for kind in ("lora_A", "lora_B"))
        with torch.no_grad():
            own.lora_A["default"].copy_(A)
            own.lora_B["default"].copy_(B)
            n = own._norm(own.lora_A["default"], own.lora_B["default"], own.adapters["default"].scaling)
        torch.testing.assert_close(n, peft.lora_magnitude_vector["default"].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_over_16_bits_the_function_is_unchanged_at_the_start(dtype, tmp_path):
    base = model().to(dtype)
    before = base(IDS)
    add_lora(base, LoRAConfig(use_dora=True, target_modules=["q_proj", "v_proj"]))
    assert base.layers[0].q_proj.lora_magnitude["default"].dtype == torch.float32
    y = base(IDS)  # a bias is added behind the magnitude, to a rounded product
    assert (y - before).norm() < torch.finfo(dtype).eps * before.norm()
    save_adapter(base, tmp_path)
    load_adapter(again := model().to(dtype), tmp_path)
    assert torch.equal(again(IDS), y)


# ---- files that do not say what they hold ----


def _without_magnitude(config, tensors):
    del tensors[KEY]


def _without_any(config, tensors):
    for key in [key for key in tensors if key.endswith("magnitude_vector")]:
        del tensors[key]


def _without_use_dora(config, tensors):
    config["use_dora"] = False


def _of_another_shape(config, tensors):
    tensors[KEY] = tensors[KEY][:-1].clone()


def _diverged(config, tensors):
    tensors[KEY][2] = float("nan")


DAMAGES = {
    "missing 1 of 12, such as '.*0.q_proj.lora_magnitude_vector', which DoRA has: use_dora is true": _without_magnitude,
    "missing 4 of 12, such as '.*lora_magnitude_vector', which DoRA has: use_dora is true": _without_any,
    "unknown '.*0.q_proj.lora_magnitude_vector', a magnitude of DoRA, but use_dora is not true": _without_use_dora,
    "'.*lora_magnitude_vector' has shape \\(7,\\), expected \\(8,\\)": _of_another_shape,
    "'.*lora_magnitude_vector' holds NaN or infinity in 1 of 8 values": _diverged,
}


@pytest.mark.parametrize("words", DAMAGES)
def test_damaged_files_change_nothing(tmp_path, words):
    peft_adapter(tmp_path, use_dora=True, target_modules=["q_proj", "v_proj"])
    config, tensors = read(tmp_path)
    DAMAGES[words](config, tensors)
    write(tmp_path, config, tensors)
    made = model()
    with pytest.raises(ValueError, match=words):
        load_adapter(made, tmp_path)
    assert type(made.layers[0].q_proj) is nn.Linear


@pytest.mark.parametrize("in_file", [True, False])
def test_an_adapter_of_the_other_kind_is_not_filled(tmp_path, in_file):
    save_adapter(own_adapter(use_dora=in_file), tmp_path)
    made = own_adapter(use_dora=not in_file)
    y = made(IDS)
    words = f"use_dora is {in_file}, but this model's adapter 'default' was added with use_dora={not in_file}; use another"
    with pytest.raises(ValueError, match=words):
        load_adapter(made, tmp_path)
    assert torch.equal(made(IDS), y)
    load_adapter(made, tmp_path, "other")


# ---- state dicts, merged models ----


def test_state_dicts_of_the_adapters():
    ours, other = own_adapter(use_dora=True), own_adapter(use_dora=True)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5 if p.requires_grad else 1)
    assert not torch.equal(other(IDS), ours(IDS))
    state = {key: tensor.clone() for key, tensor in lora_state_dict(ours).items()}
    assert {key for key in state if "magnitude" in key} == {
        f"layers.{i}.{name}.lora_magnitude.default" for i in (0, 1) for name in ("q_proj", "v_proj")
    }
    load_lora_state_dict(other, state)
    assert torch.equal(other(IDS), ours(IDS))
    del state["layers.1.v_proj.lora_magnitude.default"]
    with pytest.raises(ValueError, match=r"missing 1, such as \['layers.1.v_proj.lora_magnitude.default'\]"):
        load_lora_state_dict(other, state)


def test_a_merged_model_is_peft_s_and_the_same_before_and_after_merging(tmp_path):
    theirs = peft_adapter(tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "fc"], fan_in_fan_out=True)
    load_adapter(ours := model(), tmp_path / "adapter")
    y = ours(IDS)
    files = [save_merged(ours, tmp_path / "unmerged")]
    assert torch.equal(ours(IDS), y)
    merge_lora(ours)
    files.append(save_merged(ours, tmp_path / "merged"))
    unmerged, merged = (load_file(file) for file in files)
    expected = theirs.merge_and_unload().state_dict()
    assert unmerged.keys() == merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(unmerged[key], merged[key]), key
        close(merged[key], tensor)
    fresh = model()
    fresh.load_state_dict(merged)
    close(fresh(IDS), y)
