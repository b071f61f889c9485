"""What a key of an adapter's file names: the format, the part of a pipeline, the module, and which of its tensors.

kohya:      lora_unet_<path with _ for .>.lora_down.weight, .lora_up.weight, .alpha; lora_te_, lora_te1_, … for text encoders
diffusers:  unet.<path>.lora_A.weight, .lora.down.weight, .lora_linear_layer.down.weight; transformer., text_encoder., …
comfyui:    diffusion_model.<path>.lora_A.weight or .lora_down.weight, as ai-toolkit and ComfyUI write them
peft:       <path>.lora_A.weight, with or without base_model.model.
"""

import re
from typing import NamedTuple

DENOISER = "denoiser"  # the unet or the transformer: what a pipeline calls it
PEFT, DIFFUSERS, KOHYA, COMFYUI = "peft", "diffusers", "kohya", "comfyui"
MODEL = "base_model.model."
CONFIGS = "lora_adapter_metadata"  # where diffusers has the parts' LoraConfigs in a file's header
FLATTENED = {  # kohya's prefixes -> the part
    **{"lora_unet_": DENOISER, "lora_transformer_": DENOISER, "lycoris_": DENOISER, "lora_te_": "text_encoder"},
    **{"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"},
}
COMFYUI_PARTS = {
    **{"diffusion_model.": DENOISER, "model.diffusion_model.": DENOISER},
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.t5xxl.transformer.": "text_encoder_3",
}
DIFFUSERS_PARTS = re.compile(r"(unet|transformer|text_encoder|text_encoder_\d|transformer_\d)\.")
DOWN, UP, MID, ALPHA, MAGNITUDE, BIAS = "down", "up", "mid", "alpha", "magnitude", "bias"
ENDS = {  # how a key ends -> which tensor of the module it is
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight"), DOWN),
    **dict.fromkeys((".lora.down.weight", ".lora_linear_layer.down.weight"), DOWN),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight"), UP),
    **dict.fromkeys((".lora.up.weight", ".lora_linear_layer.up.weight"), UP),
    **{".lora_mid.weight": MID, ".alpha": ALPHA, ".lora_B.bias": BIAS},
    **dict.fromkeys((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"), MAGNITUDE),
    **{".down.weight": DOWN, ".up.weight": UP},  # of to_q_lora, as diffusers wrote it before PEFT, and XLabs' qkv_lora1
}
OTHERS = (  # kinds of adapters and files that are no LoRA, by their keys
    ("LoKr", re.compile(r"\.lokr_")),
    ("LoHa", re.compile(r"\.hada_")),
    ("OFT", re.compile(r"\.b?oft_")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("(IA)³", re.compile(r"\.ia3_|\.on_input$")),
    ("VeRA", re.compile(r"vera_lambda_")),
    ("a whole difference of a weight", re.compile(r"\.(diff|diff_b|set_weight|w_norm|b_norm)$")),
    ("a hypernetwork", re.compile(r"^(320|640|768|1024|1280)\.[01]\.")),
    ("a textual inversion", re.compile(r"^(emb_params|clip_[lg]|string_to_param)\b")),
)


class Key(NamedTuple):
    """A key in its meanings: `base` is what stands before its end, and `name` that without the part's prefix."""

    format: str
    part: str
    name: str
    base: str
    kind: str


def parse(key: str) -> Key:
    """Raises ValueError for what is no tensor of a LoRA, by the name of what it is instead."""
    for what, pattern in OTHERS:
        if pattern.search(key):
            raise ValueError(f"{key!r} is of {what}, which has no counterpart here; expected LoRA's keys")
    for end, kind in ENDS.items():
        if key.endswith(end):
            base = key[: -len(end)]
            return Key(*_place(base), base, kind)
    raise ValueError(f"unknown key {key!r}, expected one that ends in {', '.join(list(ENDS)[:2])}, … or .alpha")


def _place(base: str) -> tuple[str, str, str]:
    """(format, part, name) of a key without its end."""
    for prefix, part in FLATTENED.items():
        if base.startswith(prefix):
            return KOHYA, part, base.removeprefix(prefix)
    for prefix, part in COMFYUI_PARTS.items():
        if base.startswith(prefix):
            return COMFYUI, part, base.removeprefix(prefix)
    name = base.removeprefix(MODEL)
    if found := DIFFUSERS_PARTS.match(name):
        part = DENOISER if found[1] in ("unet", "transformer") else found[1]
        return DIFFUSERS if name == base else PEFT, part, name[found.end() :]
    return PEFT, DENOISER, name
