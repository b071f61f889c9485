"""Tiny image models and the files of their adapters, by the naming rules of the tools that write them."""

import copy
import json
import re
from functools import cache
from types import SimpleNamespace

import diffusers
import torch
from diffusers.loaders import lora_pipeline
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

UNET = {
    **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1},
    **{"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 16, "use_linear_projection": True},
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SDXL = {  # its second block has attention, with several transformer blocks, as the released model's
    **{"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "transformer_layers_per_block": (1, 2)},
    "projection_class_embeddings_input_dim": 16 + 6 * 4,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SD3 = {
    **HEADS,
    **{"sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16},
    **{"caption_projection_dim": 16, "pooled_projection_dim": 16},
}
FLUX = {
    **HEADS,
    **{"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16},
    **{"pooled_projection_dim": 16, "axes_dims_rope": (4, 2, 2), "guidance_embeds": True},
}
Z_IMAGE = {
    **{"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1},
    **{"n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [64, 32, 32]},
}
PIXART = {
    **HEADS,
    **{"in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2},
    "caption_channels": 16,
}
IMAGES, TEXT, POOLED, TIME = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16), torch.randn(2, 16), torch.tensor([3, 7])


def unet():
    return _made(diffusers.UNet2DConditionModel, UNET)


def sdxl():
    return _made(diffusers.UNet2DConditionModel, {**UNET, **SDXL})


def sd3():
    return _made(diffusers.SD3Transformer2DModel, SD3)


def flux():
    return _made(diffusers.FluxTransformer2DModel, FLUX)


def z_image():
    return _made(diffusers.ZImageTransformer2DModel, Z_IMAGE)


def pixart():
    return _made(diffusers.PixArtTransformer2DModel, PIXART)


def text_encoder(kind=CLIPTextModel):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    return kind(CLIPTextConfig(**sizes, vocab_size=50, bos_token_id=1, eos_token_id=2)).eval()


def second_text_encoder():
    return text_encoder(CLIPTextModelWithProjection)


def _made(kind, config):
    return copy.deepcopy(_first(kind, json.dumps(config)))


@cache
def _first(kind, config):
    """The model that others are copies of: half the time of making each."""
    torch.manual_seed(0)
    return kind(**json.loads(config)).eval()


@torch.no_grad()
def output(model):
    """What a model computes of the same small input."""
    name = type(model).__name__
    if name.startswith("UNet"):
        sdxl = {"text_embeds": POOLED, "time_ids": torch.ones(2, 6)}
        return model(IMAGES, TIME, TEXT, added_cond_kwargs=sdxl if model.config.addition_embed_type else None).sample
    if name.startswith("SD3"):
        return model(IMAGES, TEXT, POOLED, TIME).sample
    if name.startswith("Flux"):
        places = {"img_ids": torch.zeros(64, 3), "txt_ids": torch.zeros(5, 3)}
        pixels = IMAGES.flatten(2).mT
        return model(pixels, TEXT, POOLED, TIME / 10, guidance=TIME.float(), **places).sample
    if name.startswith("ZImage"):
        return torch.stack(model(list(IMAGES.unsqueeze(2)), TIME / 10, list(TEXT)).sample)
    if name.startswith("PixArt"):
        return model(IMAGES, TEXT, TIME, added_cond_kwargs={"resolution": None, "aspect_ratio": None}).sample
    return model(torch.tensor([[1, 5, 6, 2]])).last_hidden_state


def linear_paths(model, *ends):
    return [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and (not ends or p.endswith(ends))]


def factors(model, paths, r=3, seed=5):
    """{path: (A, B, alpha)}: ranks and alphas differ from layer to layer."""
    torch.manual_seed(seed)
    modules, made = dict(model.named_modules()), {}
    for number, path in enumerate(paths):
        rank, N, K = r + number % 2, *modules[path].weight.shape
        made[path] = torch.randn(rank, K) / K**0.5, torch.randn(N, rank) / rank**0.5, float(1 + number % 3)
    return made


@torch.no_grad()
def adapted(model, made):
    """A copy with W + (alpha / r)·B·A in place of W, in float64's rounding."""
    model = copy.deepcopy(model)
    for path, (A, B, alpha) in made.items():
        weight = model.get_submodule(path).weight
        weight += (alpha / A.shape[0] * (B.double() @ A.double())).to(weight.dtype)
    return model


def kohya(made, prefix, rename=lambda path: path, alpha=True):
    """The tensors of a file as sd-scripts names them."""
    tensors = {}
    for path, (A, B, a) in made.items():
        base = prefix + rename(path).replace(".", "_")
        tensors |= {f"{base}.lora_down.weight": A, f"{base}.lora_up.weight": B}
        tensors |= {f"{base}.alpha": torch.tensor(a)} if alpha else {}
    return tensors


def dotted(made, prefix, down="lora_A", up="lora_B"):
    """The tensors of a file with the model's own paths; alpha = r."""
    return {f"{prefix}{path}.{end}.weight": tensor for path, (A, B, _) in made.items() for end, tensor in ((down, A), (up, B))}


def saved(path, tensors, metadata=None):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
    return path


def by_diffusers(loader, path, parts):
    """The parts with the file's adapter as diffusers loads it."""
    mixin = getattr(lora_pipeline, f"{loader}LoraLoaderMixin")
    pipeline = type("Pipeline", (mixin,), {"components": parts, "lora_scale": 1.0, "hf_device_map": None})()
    for name, part in {"text_encoder": None, "text_encoder_2": None, **parts}.items():
        setattr(pipeline, name, part)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    return SimpleNamespace(**parts)


FUSED = {  # sd-scripts' names of FLUX's modules, in Black Forest Labs' code -> diffusers' modules, whose rows are these in turn
    "double_blocks_0_img_attn_qkv": [f"transformer_blocks.0.attn.to_{each}" for each in "qkv"],
    "double_blocks_0_txt_attn_qkv": [f"transformer_blocks.0.attn.add_{each}_proj" for each in "qkv"],
    "double_blocks_0_img_attn_proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks_0_txt_attn_proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks_0_img_mlp_0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks_0_img_mlp_2": ["transformer_blocks.0.ff.net.2"],
    "double_blocks_0_img_mod_lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks_0_linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks_0_modulation_lin": ["single_transformer_blocks.0.norm.linear"],
}
BEYOND = {  # those that diffusers splits by the released sizes, drops or does not scale
    "single_blocks_0_linear1": [
        *[f"single_transformer_blocks.0.attn.to_{each}" for each in "qkv"],
        "single_transformer_blocks.0.proj_mlp",
    ],
    "final_layer_linear": ["proj_out"],
    "final_layer_adaLN_modulation_1": ["norm_out.linear"],  # shift and scale are the other way round
    "img_in": ["x_embedder"],
    "guidance_in_in_layer": ["time_text_embed.guidance_embedder.linear_1"],
}


def fused(model, names, prefix, seed=4):
    """(a kohya file's tensors, {path: (A, B, alpha)}) of modules that are one there and several here."""
    torch.manual_seed(seed)
    modules, tensors, made = dict(model.named_modules()), {}, {}
    for number, (name, paths) in enumerate(names.items()):
        sizes, alpha = [modules[path].out_features for path in paths], float(1 + number % 3)
        A, B = torch.randn(3, modules[paths[0]].in_features), torch.randn(sum(sizes), 3) / 4
        base = f"{prefix}{name}"
        tensors |= {f"{base}.lora_down.weight": A, f"{base}.lora_up.weight": B, f"{base}.alpha": torch.tensor(alpha)}
        rows = torch.cat(B.chunk(2)[::-1]) if "adaLN" in name else B
        made |= {path: (A, part, alpha) for path, part in zip(paths, rows.split(sizes), strict=True)}
    return tensors, made


def sgm(path):
    """The name in Stability's code, which sd-scripts uses for SDXL, of a module in a UNet's attention."""
    parts = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|mid_block)\.attentions\.(\d)\.(.*)", path)
    block, number, attention, rest = parts.groups()
    if block is None:
        return f"middle_block.1.{rest}"
    layer = 2 * int(number) + int(attention)
    return f"input_blocks.{layer + 1}.1.{rest}" if block == "down" else f"output_blocks.{layer}.1.{rest}"


def uniform(made, alpha=2.0):
    """With one alpha: diffusers loses all others of attention layers in a UNet."""
    return {path: (A, B, alpha) for path, (A, B, _) in made.items()}


def unscaled(made):
    """With alpha = r."""
    return {path: (A, B, float(A.shape[0])) for path, (A, B, _) in made.items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
