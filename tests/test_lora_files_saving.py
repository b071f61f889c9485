"""save_adapter writes files that diffusers, and load_adapter, read: the same function, whatever was said beside the factors."""

import json
import os

import pytest
import torch
from lora_files_case import (
    by_diffusers,
    close,
    factors,
    flux,
    kohya,
    linear_paths,
    output,
    pixart,
    saved,
    second_text_encoder,
    text_encoder,
    unet,
    z_image,
)
from safetensors import safe_open
from safetensors.torch import load_file

from lora_kernels import AdaLoRAConfig, LoRAConfig, add_lora, load_adapter, save_adapter, set_adapter

HEADER = {"ss_network_dim": "3", "ss_tag_frequency": '{"cat": 7}', "sshs_model_hash": "of the file it was", "format": "pt"}
ATTENTION = ["to_q", "to_v", "to_out.0"]


def trained(model, adapter_name="default", **options):
    """The model with an adapter of random values."""
    add_lora(model, LoRAConfig(**{"r": 3, "lora_alpha": 2, "target_modules": ATTENTION, **options}), adapter_name)
    set_adapter(model, adapter_name)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.normal_(0, 0.5)
    return model


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


OPTIONS = {
    "plain": {},
    "ranks and alphas": {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 0.3, "to_out.0": 1 / 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
}


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_written_is_read_as_it_was(tmp_path, name, format):
    ours, again, theirs = trained(unet(), **OPTIONS[name]), unet(), unet()
    if (name, format) == ("bias", "kohya"):
        with pytest.raises(ValueError, match=r"attn1.*has a bias \(lora_bias\).*kohya"):
            save_adapter(ours, tmp_path / "lora", format=format)
        assert not os.listdir(tmp_path)
        return
    file = save_adapter(ours, tmp_path / "lora", format=format)
    assert file == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    loaded = load_adapter(again, tmp_path / "lora")
    assert loaded.format == format
    close(output(again), output(ours))
    assert (output(again) - output(unet())).abs().max() > 1e-3
    if format == "diffusers" or name == "plain":  # of kohya's files of a UNet it takes one alpha, and no magnitude
        by_diffusers("StableDiffusion", file, {"unet": theirs})
        close(output(theirs), output(ours))


@pytest.mark.parametrize(
    ("make", "loader", "prefix"),
    [(flux, "Flux", "lora_transformer_"), (z_image, "ZImage", "lora_unet_"), (pixart, None, "lora_transformer_")],
)
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_transformers_have_the_names_that_diffusers_reads(tmp_path, make, loader, prefix, format):
    ours, again, theirs = trained(make(), rank_pattern={"to_v": 2}), make(), make()
    file = save_adapter(ours, tmp_path / "lora.safetensors", format=format)
    assert file == tmp_path / "lora.safetensors"
    assert all(key.startswith("transformer." if format == "diffusers" else prefix) for key in load_file(file))
    load_adapter(again, file)
    close(output(again), output(ours))
    if loader:
        by_diffusers(loader, file, {"transformer": theirs})
        close(output(theirs), output(ours))


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_pipeline_s_parts_are_one_file(tmp_path, format):
    made = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": second_text_encoder}
    ours, again, theirs = ({part: make() for part, make in made.items()} for _ in range(3))
    for part, targets in (
        ("unet", ATTENTION),
        ("text_encoder", ["q_proj", "out_proj"]),
        ("text_encoder_2", ["q_proj", "out_proj"]),
    ):
        trained(ours[part], "style", target_modules=targets)
    file = save_adapter(ours, tmp_path, "style", format=format)
    assert file.parent == tmp_path / "style"
    prefixes = {key.split("encoder" if "lora_te" not in key else "text_model")[0][:9] for key in load_file(file)}
    assert ("lora_te1_" in prefixes and "lora_te2_" in prefixes) == (format == "kohya")
    loaded = load_adapter(again, tmp_path, "style")
    by_diffusers("StableDiffusionXL", file, theirs)
    for part in made:
        assert loaded[part].adapted
        close(output(again[part]), output(ours[part]))
        close(output(theirs[part]), output(ours[part]))
    alone = {"unet": ours["unet"], "text_encoder": text_encoder()}
    assert {key[:10] for key in load_file(save_adapter(alone, tmp_path / "unet", "style", format="kohya"))} == {"lora_unet_"}
    with pytest.raises(
        ValueError, match=r"\['text_encoder', 'text_encoder_2', 'unet'\], expected .* or one of the parts as model"
    ):
        save_adapter(ours, tmp_path, "style")
    with pytest.raises(KeyError, match="nobody"):
        save_adapter(ours, tmp_path, "nobody", format="kohya")


def test_a_kohya_file_comes_back_to_the_bit_with_its_header(tmp_path):
    base = unet()
    tensors = kohya(factors(base, linear_paths(base, *ATTENTION)), "lora_unet_")
    tensors["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"] = torch.randn(3, 16)
    tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.randn(16, 3)
    tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(0.1, dtype=torch.float64)
    load_adapter(base, saved(tmp_path / "in.safetensors", tensors, HEADER))
    file = save_adapter(base, tmp_path / "out.safetensors", format="kohya")
    written = load_file(file)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key].float(), tensors[key].float()) for key in tensors)
    assert header(file) == {name: text for name, text in HEADER.items() if not name.startswith("sshs_")}
    other = save_adapter(base, tmp_path / "other.safetensors", format="diffusers")
    assert header(other)["ss_network_dim"] == "3"
    assert json.loads(header(other)["lora_adapter_metadata"])["unet.r"] == 3
    load_adapter(back := unet(), other)
    assert load_file(save_adapter(back, tmp_path / "back.safetensors", format="kohya")).keys() == tensors.keys()
    assert header(tmp_path / "back.safetensors") == header(file)


def test_what_a_format_cannot_hold(tmp_path):
    whole = trained(unet(), modules_to_save=["conv_out"])
    with pytest.raises(
        ValueError, match=r"'base_model.model.conv_out.bias' is no part of a LoRA, and only PEFT's format has it"
    ):
        save_adapter(whole, tmp_path / "lora.safetensors", format="kohya")
    adalora = unet()
    add_lora(adalora, AdaLoRAConfig(target_modules=["to_q"], total_step=9, tinit=1, tfinal=1))
    with pytest.raises(ValueError, match=r"to_q: its adapter is no product of .*; call compact_ranks"):
        save_adapter(adalora, tmp_path / "lora.safetensors", format="diffusers")
    with pytest.raises(ValueError, match=r"format: got 'comfyui', expected one of \('peft', 'diffusers', 'kohya'\)"):
        save_adapter(whole, tmp_path, format="comfyui")
    assert not os.listdir(tmp_path)
