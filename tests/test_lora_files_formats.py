"""load_adapter reads the files of diffusers, kohya's sd-scripts, ComfyUI and ai-toolkit as these tools and diffusers do."""

import pytest
import torch
from diffusers.loaders import lora_pipeline
from lora_files_case import (
    BEYOND,
    FUSED,
    adapted,
    by_diffusers,
    close,
    dotted,
    factors,
    flux,
    fused,
    kohya,
    linear_paths,
    output,
    pixart,
    saved,
    sd3,
    sdxl,
    second_text_encoder,
    sgm,
    text_encoder,
    unet,
    uniform,
    unscaled,
    z_image,
)
from transformers import CLIPTextModelWithProjection

from lora_kernels import load_adapter, merge_lora, set_adapter, unmerge_lora

TARGETS = ("to_q", "to_out.0", "net.2")
MODELS = {  # a model, diffusers' loader for it, the part it is, and spellings that diffusers reads for it
    "unet": (unet, "StableDiffusion", "unet", ("kohya", "diffusers", "before PEFT")),
    "sd3": (sd3, "SD3", "transformer", ("diffusers", "before PEFT")),
    "flux": (flux, "Flux", "transformer", ("diffusers", "before PEFT")),
    "z_image": (z_image, "ZImage", "transformer", ("kohya", "diffusers", "before PEFT", "comfyui")),
    "pixart": (pixart, None, "transformer", ()),
}
SPELLINGS = {  # how a file is written, what it is told to be, and whether it has alphas
    "kohya": (lambda made, part: kohya(made, "lora_unet_"), "kohya", True),
    "kohya without alpha": (lambda made, part: kohya(made, "lora_unet_", alpha=False), "kohya", False),
    "onetrainer": (lambda made, part: kohya(made, "lora_transformer_"), "kohya", True),
    "diffusers": (lambda made, part: dotted(made, f"{part}."), "diffusers", False),
    "before PEFT": (lambda made, part: dotted(made, f"{part}.", "lora.down", "lora.up"), "diffusers", False),
    "comfyui": (lambda made, part: dotted(made, "diffusion_model."), "comfyui", False),
    "PEFT's without a configuration": (lambda made, part: dotted(made, "base_model.model."), "peft", False),
}


FEW = ("kohya", "diffusers", "comfyui")  # of models whose names are no harder than others'
CASES = [(name, spelling) for name in MODELS for spelling in (FEW if name in ("sd3", "pixart") else SPELLINGS)]


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_a_file_is_what_its_tool_means_by_it(tmp_path, name, spelling):
    make, loader, part, read = MODELS[name]
    write, told, alphas = SPELLINGS[spelling]
    base = make()
    made = factors(base, linear_paths(base, *TARGETS))
    made = (made if loader != "StableDiffusion" else uniform(made)) if alphas else unscaled(made)
    file, ours = saved(tmp_path / "lora.safetensors", write(made, part)), make()
    loaded = load_adapter(ours, file)
    expected = output(adapted(base, made))
    close(output(ours), expected)
    assert (output(base) - expected).abs().max() > 0.1
    assert (loaded.format, loaded.directory, loaded.active) == (told, file, True)
    assert loaded.adapted == {path: len(A) for path, (A, _, _) in made.items()}
    assert f"{file}{f' ({told})' * (told != 'peft')}: {len(made)} LoRA layers, r = 3, 4" in str(loaded)
    if spelling in read:
        theirs = make()
        by_diffusers(loader, file, {part: theirs})
        close(output(theirs), expected)


def test_sdxl_in_stability_s_names(tmp_path):
    base, ours, theirs = sdxl(), sdxl(), sdxl()
    paths = [path for path in linear_paths(base, *TARGETS, "proj", "proj_in", "proj_out") if "attentions" in path]
    made = factors(base, paths)
    load_adapter(ours, saved(tmp_path / "each.safetensors", kohya(made, "lora_unet_", sgm)))
    close(output(ours), output(adapted(base, made)))
    file = saved(tmp_path / "one.safetensors", kohya(uniform(made), "lora_unet_", sgm))
    mixin = lora_pipeline.StableDiffusionXLLoraLoaderMixin
    ours = type("Pipeline", (mixin,), {"components": {"unet": sdxl(), "vae": None, "scheduler": object()}})()
    assert list(load_adapter(ours, file)) == ["unet"]
    by_diffusers("StableDiffusionXL", file, {"unet": theirs})
    close(output(ours.components["unet"]), output(theirs))


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "comfyui with PEFT's ends"])
def test_flux_in_black_forest_labs_names(tmp_path, spelling):
    def spelled(tensors):
        if spelling == "kohya":
            return tensors
        for word in ("blocks_0_", "attn_", "mlp_", "mod_", "modulation_", "layer_", "guidance_in_"):
            dots = "blocks.0." if word == "blocks_0_" else f"{word[:-1]}."
            tensors = {key.replace(word, dots): tensor for key, tensor in tensors.items()}
        ends = ("lora_down", "lora_A"), ("lora_up", "lora_B")
        for end, other in ends if "PEFT" in spelling else ():
            tensors = {key.replace(end, other): tensor for key, tensor in tensors.items()}
        return tensors

    base, ours, theirs = flux(), flux(), flux()
    prefix = "lora_unet_" if spelling == "kohya" else "diffusion_model."
    tensors, made = fused(base, FUSED | BEYOND, prefix)
    load_adapter(ours, saved(tmp_path / "all.safetensors", spelled(tensors)))
    close(output(ours), output(adapted(base, made)))
    if "PEFT" in spelling:  # diffusers takes these for its own names, and finds none
        return
    tensors, made = fused(base, FUSED, prefix)
    by_diffusers("Flux", saved(tmp_path / "part.safetensors", spelled(tensors)), {"transformer": theirs})
    close(output(theirs), output(adapted(base, made)))


def test_z_image_s_fused_attention(tmp_path):
    base, ours, theirs = z_image(), z_image(), z_image()
    names = {
        "layers_0_attention_qkv": [f"layers.0.attention.to_{each}" for each in "qkv"],
        "layers_0_attention_out": ["layers.0.attention.to_out.0"],
    }
    tensors, made = fused(base, names, "lora_unet_")
    file = saved(tmp_path / "lora.safetensors", tensors)
    load_adapter(ours, file)
    by_diffusers("ZImage", file, {"transformer": theirs})
    close(output(ours), output(adapted(base, made)))
    close(output(theirs), output(ours))


def test_names_of_attention_processors_from_before_peft(tmp_path):
    base, ours, theirs = unet(), unet(), unet()
    made = unscaled(factors(base, linear_paths(base, "to_q", "to_k", "to_v", "to_out.0")))
    tensors = dotted(made, "unet.", "down", "up")
    for end in ("to_q", "to_k", "to_v"):
        tensors = {key.replace(f".{end}.", f".processor.{end}_lora."): tensor for key, tensor in tensors.items()}
    tensors = {key.replace(".to_out.0.", ".processor.to_out_lora."): tensor for key, tensor in tensors.items()}
    file = saved(tmp_path / "lora.safetensors", tensors)
    load_adapter(ours, file)
    by_diffusers("StableDiffusion", file, {"unet": theirs})
    close(output(ours), output(adapted(base, made)))
    close(output(theirs), output(ours))


def _pipeline():
    return {"unet": sdxl(), "text_encoder": text_encoder(), "text_encoder_2": second_text_encoder()}


def _with_text_model(path):
    return path if path.startswith("text_model.") else f"text_model.{path}"


@pytest.mark.parametrize("spelling", ["kohya", "diffusers", "old names"])
def test_text_encoders_go_to_the_pipeline_s_parts(tmp_path, spelling):
    base, ours, theirs = _pipeline(), _pipeline(), _pipeline()
    ends = {"unet": ("to_q", "to_v"), "text_encoder": ("q_proj", "out_proj"), "text_encoder_2": ("q_proj", "out_proj", "fc1")}
    made = {part: factors(model, linear_paths(model, *ends[part]), seed=len(part)) for part, model in base.items()}
    if spelling == "kohya":
        made = {part: uniform(each) for part, each in made.items()}
        tensors = kohya(made["unet"], "lora_unet_")
        tensors |= kohya(made["text_encoder"], "lora_te1_", _with_text_model)
        tensors |= kohya(made["text_encoder_2"], "lora_te2_", _with_text_model)
    else:
        made = {part: unscaled(each) for part, each in made.items()}
        tensors = dotted(made["unet"], "unet.")
        kinds = "lora_linear_layer.down", "lora_linear_layer.up"
        tensors |= dotted(made["text_encoder"], "text_encoder.text_model.", *kinds)
        tensors |= dotted(made["text_encoder_2"], "text_encoder_2.", *kinds)
        olds = (("q_proj.lora_linear_layer", "to_q_lora"), ("out_proj.lora_linear_layer", "to_out_lora"))
        for new, old in olds if spelling == "old names" else ():
            tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    file = saved(tmp_path / "lora.safetensors", tensors)
    loaded = load_adapter(ours, file)
    assert {part: each.adapted.keys() for part, each in loaded.items()} == {part: each.keys() for part, each in made.items()}
    by_diffusers("StableDiffusionXL", file, theirs)
    for part in base:
        close(output(ours[part]), output(adapted(base[part], made[part])))
        close(output(theirs[part]), output(ours[part]))


def test_a_text_encoder_alone_and_flux_s_third_of_two(tmp_path):
    base, ours = second_text_encoder(), text_encoder(CLIPTextModelWithProjection)
    made = factors(base, linear_paths(base, "q_proj"))
    load_adapter(ours, saved(tmp_path / "te.safetensors", kohya(made, "lora_te_")))
    close(output(ours), output(adapted(base, made)))
    parts = {"text_encoder": text_encoder(), "text_encoder_2": second_text_encoder()}
    loaded = load_adapter(parts, saved(tmp_path / "te3.safetensors", kohya(made, "lora_te3_")))
    assert list(loaded) == ["text_encoder_2"]


def test_several_files_with_weights_in_one_model_and_out_again(tmp_path):
    base, ours = unet(), unet()
    one, two = factors(base, linear_paths(base, "to_q", "to_v")), factors(base, linear_paths(base, "to_v", "to_out.0"), seed=6)
    load_adapter(ours, saved(tmp_path / "one.safetensors", kohya(one, "lora_unet_")), "one")
    load_adapter(ours, saved(tmp_path / "two.safetensors", kohya(two, "lora_unet_")), "two")
    set_adapter(ours, None)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    weighted = [{path: (A, B, w * alpha) for path, (A, B, alpha) in made.items()} for made, w in ((one, 0.7), (two, -0.4))]
    merge_lora(ours, {"one": 0.7, "two": -0.4})
    close(output(ours), output(adapted(adapted(base, weighted[0]), weighted[1])))
    unmerge_lora(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert torch.equal(output(ours), output(base))
