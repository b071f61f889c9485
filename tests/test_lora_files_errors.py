"""A file is nobody's friend: what is wrong with one is an error that names it and the key, before anything has changed."""

import json
import re
import struct
from collections import OrderedDict

import pytest
import torch
from lora_files_case import dotted, factors, flux, kohya, linear_paths, saved, sdxl, text_encoder, unet, unscaled
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, load_adapter, merge_lora

PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ONE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP, ALPHA = f"{ONE}.lora_down.weight", f"{ONE}.lora_up.weight", f"{ONE}.alpha"


def good():
    return {DOWN: torch.randn(2, 16), UP: torch.randn(16, 2), ALPHA: torch.tensor(2.0)}


def without(key):
    return {name: tensor for name, tensor in good().items() if name != key}


def renamed(old, new):
    return {name.replace(old, new): tensor for name, tensor in good().items()}


BAD = {  # what is in the file, and what the error says of it
    "no up": (without(UP), rf"'{ONE}' has .*lora_down.weight'\], and no up matrix beside"),
    "no down": (without(DOWN), rf"'{ONE}' has .*, and no down matrix beside"),
    "an alpha alone": ({ALPHA: torch.tensor(1.0)}, rf"'{ONE}' has \['{ALPHA}'\], and no down matrix"),
    "nothing": ({}, "no tensors, expected LoRA's"),
    "unknown key": (good() | {f"{ONE}.weight": torch.ones(2)}, rf"unknown key '{ONE}.weight', expected one that ends in"),
    "unknown module": (renamed("attn1_to_q", "attn7_to_q"), "'lora_unet_mid_block_.*_attn7_to_q.lora_down.weight'"),
    "another codebase's": (renamed("mid_block", "middle_block_9"), "lora_unet_middle_block_9_.*lora_down.weight'"),
    "another model's width": (good() | {DOWN: torch.randn(2, 12)}, rf"'{DOWN}' is \[2, 12\], with \[16, 2\] beside, for mid_"),
    "another model's height": (good() | {UP: torch.randn(12, 2)}, rf"'{DOWN}' is \[2, 16\], with \[12, 2\] beside"),
    "ranks that differ": (good() | {UP: torch.randn(16, 3)}, rf"'{UP}' has shape \(16, 3\), expected \[out, 2\]"),
    "a vector": (good() | {DOWN: torch.randn(32)}, rf"'{DOWN}' has shape \(32,\), expected \[r, in\]"),
    "rank 0": (good() | {DOWN: torch.ones(0, 16), UP: torch.ones(16, 0)}, rf"'{DOWN}' has shape \(0, 16\)"),
    "NaN": (good() | {UP: torch.full((16, 2), torch.nan)}, rf"'{UP}' holds NaN or infinity in 32 of 32"),
    "an infinite alpha": (
        good() | {ALPHA: torch.tensor(torch.inf)},
        rf"'{ALPHA}' holds \[inf\], expected one finite number above 0",
    ),
    "an alpha of 0": (good() | {ALPHA: torch.tensor(0.0)}, rf"'{ALPHA}' holds \[0.0\], expected one finite number above 0"),
    "two alphas": (good() | {ALPHA: torch.ones(2)}, rf"'{ALPHA}' holds \[1.0, 1.0\], expected one finite number"),
    "float8": (good() | {UP: torch.ones(16, 2).to(torch.float8_e4m3fn)}, rf"'{UP}' has dtype F8_E4M3, expected .*; convert it"),
    "integers": (good() | {DOWN: torch.ones(2, 16, dtype=torch.int32)}, rf"'{DOWN}' has dtype I32, expected one of F64"),
    "columns' magnitudes": (good() | {f"{ONE}.dora_scale": torch.ones(1, 16)}, rf"'{ONE}.dora_scale' has shape \(1, 16\)"),
    "Tucker of a linear layer": (good() | {f"{ONE}.lora_mid.weight": torch.ones(2, 2)}, "lora_mid.weight' has shape"),
    "the same twice": (
        good() | dotted({PATH: (torch.ones(2, 16), torch.ones(16, 2), 2.0)}, "unet."),
        rf"'unet.{PATH}.lora_A.weight' and '{DOWN}' are both for {PATH}",
    ),
    "LoKr": (good() | {f"{ONE}.lokr_w1": torch.ones(2, 2)}, rf"'{ONE}.lokr_w1' is of LoKr, which has no counterpart"),
    "LoHa": ({f"{ONE}.hada_w1_a": torch.ones(2, 2)}, "is of LoHa"),
    "OFT": ({f"{ONE}.oft_blocks": torch.ones(2, 2, 2)}, "is of OFT"),
    "BOFT": ({f"{ONE}.boft_R": torch.ones(2, 2, 2)}, "is of OFT"),
    "GLoRA": ({f"{ONE}.a1.weight": torch.ones(2, 2)}, "is of GLoRA"),
    "(IA)³": ({f"{ONE}.on_input": torch.ones(1)}, r"is of \(IA\)³"),
    "a difference": (good() | {f"{ONE}.diff_b": torch.ones(16)}, "is of a whole difference of a weight"),
    "a hypernetwork": ({"768.0.linear1.weight": torch.ones(2, 2)}, "is of a hypernetwork"),
    "a textual inversion": ({"emb_params": torch.ones(2, 16)}, "is of a textual inversion"),
    "a checkpoint": (
        {"down_blocks.0.resnets.0.conv1.weight": torch.ones(2, 2)},
        "unknown key 'down_blocks.0.resnets.0.conv1.weight'",
    ),
    "a text encoder too": (
        good() | {key.replace("unet", "te").replace("mid_block", "x"): tensor for key, tensor in good().items()},
        r"it has adapters for \['denoiser', 'text_encoder'\], and one model is here: pass the pipeline",
    ),
}


def unchanged(model):
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "_lora_state")


@pytest.fixture(scope="module")
def model():
    return unet()


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named_and_nothing_changes(tmp_path, model, what):
    tensors, message = BAD[what]
    file = saved(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: .*({message})"):
        load_adapter(model, file)
    unchanged(model)


def test_the_good_one_is_good(tmp_path):
    """Otherwise the errors above might be others'."""
    assert len(load_adapter(unet(), saved(tmp_path / "lora.safetensors", good())).adapted) == 1


def test_a_part_that_is_not_there(tmp_path, model):
    file = saved(
        tmp_path / "lora.safetensors",
        good() | {f"lora_te2_x.{end}": torch.ones(2, 2) for end in ("lora_down.weight", "lora_up.weight")},
    )
    with pytest.raises(
        ValueError, match=r"'lora_te2_x.lora_down.weight': it is for the text_encoder_2, and the parts here are"
    ):
        load_adapter({"unet": model, "text_encoder": text_encoder()}, file)
    unchanged(model)
    with pytest.raises(TypeError, match=r"model: got dict, expected an nn.Module, a diffusers pipeline, or its parts"):
        load_adapter({"unet": 3}, file)


def test_a_second_part_that_does_not_fit_leaves_the_first_alone(tmp_path):
    parts = {"unet": unet(), "text_encoder": text_encoder()}
    made = unscaled(factors(parts["text_encoder"], ["encoder.layers.0.mlp.fc1"]))
    tensors = good() | dotted(made, "text_encoder.")
    tensors["text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.ones(3, 7)
    with pytest.raises(ValueError, match=r"'text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight' is \[3, 7\]"):
        load_adapter(parts, saved(tmp_path / "lora.safetensors", tensors))
    for part in parts.values():
        unchanged(part)


def test_two_modules_that_flatten_to_one_name(tmp_path):
    base = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(2, 4), "lora_unet_a_b.lora_up.weight": torch.ones(4, 2)}
    file = saved(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(ValueError, match=r"'lora_unet_a_b.lora_down.weight': 'a_b' may be 'a_b' or 'a.b', which both"):
        load_adapter(base, file)
    unchanged(base)
    dots = {key.replace("lora_unet_a_b", "a.b"): tensor for key, tensor in tensors.items()}
    assert list(load_adapter(base, saved(tmp_path / "dots.safetensors", dots)).adapted) == ["a.b"]


def test_names_of_other_codebases_need_a_model_of_diffusers(tmp_path):
    base = nn.ModuleDict({"a": nn.Linear(16, 16)})
    with pytest.raises(
        ValueError, match=rf"'{DOWN}': no module of ModuleDict has its name; expected a name made of its modules'"
    ):
        load_adapter(base, saved(tmp_path / "lora.safetensors", good()))


def test_fused_rows_that_are_not_the_model_s(tmp_path):
    name = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(100, 2)}
    with pytest.raises(ValueError, match=rf"'{name}.lora_down.weight': 100 rows beside, expected 16 \+ 16 \+ 16 \+ 64 for"):
        load_adapter(flux(), saved(tmp_path / "lora.safetensors", tensors))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 16), f"{name}.lora_up.weight": torch.ones(47, 2)}
    with pytest.raises(ValueError, match=rf"'{name}.lora_down.weight'"):
        load_adapter(flux(), saved(tmp_path / "lora.safetensors", tensors))


def test_dora_in_some_layers_alone(tmp_path):
    base = unet()
    tensors = kohya(factors(base, linear_paths(base, "to_q")), "lora_unet_")
    tensors[next(iter(tensors)).replace("lora_down.weight", "dora_scale")] = torch.ones(16, 1)
    with pytest.raises(ValueError, match=r"to_q.lora_down.weight' has no DoRA's magnitude beside, and others have"):
        load_adapter(base, saved(tmp_path / "lora.safetensors", tensors))


def test_files_that_are_none(tmp_path, model):
    file = tmp_path / "lora.safetensors"
    saved(file, good())
    whole = file.read_bytes()
    for size in (0, 4, 12, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: no safetensors file, or cut off"):
            load_adapter(model, file)
    file.write_bytes(struct.pack("<Q", 1 << 62) + whole[8:])
    with pytest.raises(ValueError, match="no safetensors file, or cut off"):
        load_adapter(model, file)
    for name, new in (("lora.pt", True), ("lora.ckpt", False), ("lora.bin", True), ("lora.safetensors", True)):
        torch.save(OrderedDict(good()), tmp_path / name, _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}: a pickle, which can run any code"):
            load_adapter(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere.safetensors: no such file"):
        load_adapter(model, tmp_path / "nowhere.safetensors")
    unchanged(model)


def test_every_length_of_a_header_is_a_file_s(tmp_path):
    """Its low byte may be a pickle's first, 0x80."""
    for size in range(256):
        file = saved(tmp_path / "lora.safetensors", good(), {"pad": "x" * size})
        if file.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no such header")
    load_adapter(unet(), file)


def test_a_directory_with_one_file_is_that_file_s(tmp_path):
    file = saved(tmp_path / "style.safetensors", good())
    assert load_adapter(unet(), tmp_path).directory == file
    saved(tmp_path / "other.safetensors", good())
    with pytest.raises(ValueError, match=r"got \['other.safetensors', 'style.safetensors'\], expected one of these files"):
        load_adapter(unet(), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100000, "lora_adapter_metadata: not JSON"),
        ("{", "lora_adapter_metadata: not JSON"),
        ("[]", "lora_adapter_metadata: got a list, expected an object"),
        (json.dumps({"unet.r": 3}), r"'unet\..*lora_A.weight' is of rank 2, and the configuration beside says 3 for mid_block"),
        (json.dumps({"unet.r": -1}), "its lora_adapter_metadata: r: got -1"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": "x"}), "lora_alpha: got 'x'"),
        (json.dumps({"unet.r": 2, "unet.layer_replication": [[0, 1]]}), "layer_replication is .* no counterpart"),
    ],
)
def test_diffusers_configurations_are_checked(tmp_path, model, text, message):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
    file = saved(tmp_path / "lora.safetensors", tensors, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: .*{message}"):
        load_adapter(model, file)
    unchanged(model)


def test_models_that_are_not_ready(tmp_path):
    file, base = saved(tmp_path / "lora.safetensors", good()), unet()
    load_adapter(base, file)
    with pytest.raises(ValueError, match=r"scales mid_block.*use another adapter name"):
        load_adapter(base, saved(tmp_path / "half.safetensors", good() | {ALPHA: torch.tensor(1.0)}))
    merge_lora(base)
    with pytest.raises(RuntimeError, match="merged"):
        load_adapter({"unet": base}, file)


def test_merging_several_says_what_cannot_be_summed(tmp_path):
    base = unet()
    load_adapter(base, saved(tmp_path / "lora.safetensors", good()), "one")
    add_lora(base, LoRAConfig(target_modules=["to_v"], use_dora=True), "dora")
    add_lora(base, LoRAConfig(target_modules=["to_k"], modules_to_save=["conv_in"]), "whole")
    for adapters, error, message in (
        ({"one": 1.0, "nobody": 1.0}, KeyError, "nobody"),
        ({"one": 1.0, "dora": 1.0}, ValueError, "'dora' is a DoRA adapter"),
        ({"one": 1.0, "whole": 1.0}, ValueError, r"\['whole'\] train conv_in whole"),
        ({"one": float("nan")}, ValueError, "weights: got"),
        ({}, ValueError, r"adapters: got \[\]"),
    ):
        with pytest.raises(error, match=message):
            merge_lora(base, adapters)
    assert not any(module.merged for module in base.modules() if isinstance(module, LoRALinear))


def test_sdxl_s_names_that_are_not_the_model_s(tmp_path):
    tensors = {key.replace(ONE, "lora_unet_input_blocks_77_1_proj_in"): tensor for key, tensor in good().items()}
    with pytest.raises(ValueError, match=r"'lora_unet_input_blocks_77_1_proj_in.lora_down.weight': no module"):
        load_adapter(sdxl(), saved(tmp_path / "lora.safetensors", tensors))
