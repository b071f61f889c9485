"""LoRA files of image tools damaged at random, by a seed: keys of all formats mixed and misspelt, convolutions, several parts.

Each is read as what it says, or is a ValueError that names the file, and the model is as it was; so is each converted.
"""

import random
import time
from pathlib import Path

import pytest
import torch
from damage import TENSORS, damaged
from safetensors.torch import save
from torch import Tensor, nn

from lora_kernels import load_adapter
from lora_kernels.models.conversion import read_parts, write_parts
from lora_kernels.models.lora_files.keys import ENDS
from lora_kernels.models.lora_files.writing import FORMATS

R = 3
LAYERS = {  # part -> path -> (shape of down, shape of up)
    "unet": {
        "down_blocks.0.attn.to_q": ((R, 8), (8, R)),
        "down_blocks.0.attn.to_out.0": ((R, 8), (6, R)),
        "down_blocks.0.conv": ((R, 4, 3, 3), (5, R, 1, 1)),
    },
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj": ((R, 8), (8, R))},
}
PREFIXES = [
    *(
        "lora_unet_",
        "lora_te_",
        "lora_te1_",
        "lora_te2_",
        "lycoris_",
        "unet.",
        "text_encoder.",
        "transformer.",
        "diffusion_model.",
    ),
    *(
        "model.diffusion_model.",
        "text_encoders.clip_l.transformer.",
        "base_model.model.",
        "",
        ".",
        "unet",
        "lora_unet_lora_unet_",
    ),
]
PIECES = [
    "",
    ".",
    "..",
    "_",
    "0",
    "9",
    "attn",
    "to_q",
    "conv",
    "\0",
    "\ud800".encode("utf-8", "replace").decode(),
    "é",
    "[",
    "a" * 999,
]
NO_LORA = [".lokr_w1", ".hada_w1_a", ".oft_blocks", ".diff", ".diff_b", ".weight", ".bias", "", ".lora_C.weight", ".lora_up"]


def parts() -> dict[str, nn.Module]:
    """Modules with the paths of LAYERS, as those of a pipeline."""
    torch.manual_seed(0)
    attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 6)])})
    unet = nn.ModuleDict({"down_blocks": nn.ModuleList([nn.ModuleDict({"attn": attn, "conv": nn.Conv2d(4, 5, 3)})])})
    layers = nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})])
    text = nn.ModuleDict({"text_model": nn.ModuleDict({"encoder": nn.ModuleDict({"layers": layers})})})
    return {"unet": unet, "text_encoder": text}


def good(format: str) -> dict[str, Tensor]:
    """The file as kohya's, diffusers', and ComfyUI's tools write it."""
    torch.manual_seed(1)
    file = {}
    for part, layers in LAYERS.items():
        for path, (down, up) in layers.items():
            if format == "kohya":
                name = f"{'lora_unet' if part == 'unet' else 'lora_te'}_{path.replace('.', '_')}"
                file |= {f"{name}.lora_down.weight": torch.randn(down), f"{name}.lora_up.weight": torch.randn(up)}
                file[f"{name}.alpha"] = torch.tensor(2.0)
            else:
                name = f"{part}.{path}"
                if format == "comfyui":
                    name = f"{'diffusion_model' if part == 'unet' else 'text_encoders.clip_l.transformer'}.{path}"
                file |= {f"{name}.lora_A.weight": torch.randn(down), f"{name}.lora_B.weight": torch.randn(up)}
    return file


def another_key(key: str, draw: random.Random) -> str:
    """`key` with another prefix, end or piece."""
    base = next((key.removesuffix(end) for end in ENDS if key.endswith(end)), key)
    kind = draw.randrange(4)
    if kind == 0:
        return base + draw.choice([*ENDS, *NO_LORA])
    if kind == 1:
        prefix = next((prefix for prefix in PREFIXES if prefix and key.startswith(prefix)), "")
        return draw.choice(PREFIXES) + key.removeprefix(prefix)
    if kind == 2:
        pieces = key.split(draw.choice("._"))
        pieces[draw.randrange(len(pieces))] = draw.choice(PIECES)
        return draw.choice("._").join(pieces)
    at = draw.randrange(len(key) + 1)
    return key[:at] + draw.choice(PIECES) + key[at:]


def damaged_tensors(tensors: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
    tensors = dict(tensors)
    for _ in range(draw.choice([1, 1, 2, 4])):
        key, kind = draw.choice(list(tensors)), draw.randrange(6)
        if kind == 0:
            tensors[another_key(key, draw)] = tensors[key].clone()
        elif kind == 1:
            tensors[another_key(key, draw)] = tensors.pop(key)
        elif kind == 2 and len(tensors) > 1:
            del tensors[key]
        elif kind == 3:  # one more tensor of the module: a middle of convolutions, a magnitude, an alpha, a bias
            base = next((key.removesuffix(end) for end in ENDS if key.endswith(end)), key)
            shape = draw.choice([(), (1,), (R, R, 3, 3), (R, R), (8,), (8, 1), (1, 8), (5, 1, 1, 1), (0,)])
            tensors[base + draw.choice(list(ENDS))] = torch.randn(shape)
        elif kind == 4:
            own = tensors[key] if tensors[key].dtype == torch.float32 else torch.randn(tensors[key].shape)  # damaged before
            tensors[key] = draw.choice(TENSORS)(own).contiguous()
        else:
            shape = list(tensors[key].shape) or [1]
            shape[draw.randrange(len(shape))] = draw.choice([0, 1, 2, R, 8, 64])
            tensors[key] = torch.randn(shape)
    return tensors


def check_loading(path: Path) -> None:
    into, start = parts(), time.thread_time()
    refused = None
    before = {part: {name: t.clone() for name, t in model.state_dict().items()} for part, model in into.items()}
    try:
        load_adapter(into, path)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(str(path))
        for part, model in into.items():
            after = model.state_dict()
            assert after.keys() == before[part].keys()
            assert all(torch.equal(t, before[part][name]) for name, t in after.items())
    else:
        assert all(t.isfinite().all() for model in into.values() for t in model.state_dict().values())
    assert time.thread_time() - start < 20


def check_converting(path: Path, draw: random.Random) -> None:
    """With the model and without; what was read is written in any format, or refused."""
    refused: list[str] = []
    for models in (parts(), None):
        try:
            found, metadata = read_parts(path, models)
        except ValueError as error:
            refused.append(str(error))
            continue
        target = path.with_name("converted.safetensors")
        try:
            write_parts(found, target, draw.choice(list(FORMATS)), metadata, models)
        except ValueError:
            continue
        check_loading(target)
    assert all(error.startswith(str(path)) for error in refused)


@pytest.mark.filterwarnings("ignore:.* match")
@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya"])
@pytest.mark.seeds(1)
def test_it_is_read_or_nothing_changes(tmp_path, seed, format):
    draw, path = random.Random(f"{seed} {format}"), tmp_path / "lora.safetensors"
    for _ in range(40):
        tensors = damaged_tensors(good(format), draw)
        raw = save(tensors, {"ss_network_dim": "3"} if draw.random() < 0.5 else None)
        path.write_bytes(damaged(raw, draw) if draw.random() < 0.2 else raw)
        check_loading(path)
        check_converting(path, draw)


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "kohya"])
def test_the_undamaged_file_is_read(tmp_path, format):
    """Otherwise the damage would not matter."""
    path, into = tmp_path / "lora.safetensors", parts()
    path.write_bytes(save(good(format)))
    load_adapter(into, path)
    counts = {part: sum("lora_A" in name for name in model.state_dict()) for part, model in into.items()}
    assert counts == {part: len(layers) for part, layers in LAYERS.items()}


def test_a_header_that_is_no_object_is_the_file_s_where_no_model_is_given(tmp_path):
    """Once an error without the file's name."""
    path = tmp_path / "lora.safetensors"
    path.write_bytes(save(good("diffusers"), {"lora_adapter_metadata": "[]"}))
    with pytest.raises(ValueError, match=rf"^{path}: its header's lora_adapter_metadata: got a list, expected an object"):
        read_parts(path)
