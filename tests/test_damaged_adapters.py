"""Adapters' files damaged at random, by a seed: each loads as what it says, or is a ValueError and the model is as it was."""

import json
import math
import random
import time
import warnings
from pathlib import Path

import pytest
import torch
from adapter_case import CONFIG, WEIGHTS, model, own_adapter
from damage import DEEP_ONES, HUGE, READ, SLOW, TEXTS, VALUES, damaged, joined, split
from safetensors.torch import load, save, save_file
from torch import Tensor

from lora_kernels import AdaLoRAConfig, LoRAConfig, add_lora, load_adapter, save_adapter

UNKNOWN = ["unknown", "layer_replication", "target_parameters", "use_qalora", "inference_mode", "loftq_config", "peft_type"]


def files(folder: Path, adalora: bool = False) -> tuple[dict, bytes]:
    """What PEFT's two files hold, of an adapter with r = 4 in four layers."""
    made = model() if adalora else own_adapter()
    if adalora:
        add_lora(made, AdaLoRAConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "v_proj"]))
    save_adapter(made, folder)
    return json.loads((folder / CONFIG).read_text()), (folder / WEIGHTS).read_bytes()


def values(of) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in of.state_dict().items()}


def loads(path: Path, into) -> LoRAConfig | None:
    """The configuration as which the file loads; None where it is refused, its error names it and nothing has changed."""
    before, start = values(into), time.thread_time()
    try:
        found = load_adapter(into, path)
    except ValueError as error:
        found, refused = None, str(error)
    assert time.thread_time() - start < 20
    after = into.state_dict()
    if found is not None:
        assert all(t.isfinite().all() for t in after.values())
        return found.config
    assert refused.startswith(str(path))
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    return None


def written(folder: Path, config: str, weights: bytes) -> Path:
    (folder / CONFIG).write_text(config)
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def says(config: LoRAConfig, given: dict) -> None:
    """Whether the fields that are read have the file's values, and not what Python takes for the same."""
    for name in READ & given.keys():
        own, value = getattr(config, name), given[name]
        if isinstance(config, AdaLoRAConfig) and name in ("r", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"):
            continue
        assert own == value or (value is None and not own), (name, own, value)
        assert isinstance(own, bool) == isinstance(value, bool), (name, own, value)


@pytest.mark.filterwarnings("ignore:.* match", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("adalora", [False, True], ids=["LORA", "ADALORA"])
@pytest.mark.seeds(3)
def test_a_configuration(tmp_path, seed, adalora):
    draw, (config, weights), into = random.Random(seed), files(tmp_path, adalora), model()
    names = [*config, *UNKNOWN]
    for _ in range(80):
        changed = {**config, **{draw.choice(names): draw.choice(VALUES) for _ in range(draw.choice([1, 1, 2]))}}
        if draw.random() < 0.1:
            changed.pop(draw.choice(list(config)))
        text = json.dumps(changed)
        if draw.random() < 0.2:
            text = text.replace("null", draw.choice(DEEP_ONES), 1) if draw.random() < 0.3 else text[: draw.randrange(len(text))]
        if (found := loads(written(tmp_path, text, weights), into)) is not None:
            says(found, changed)
            into = model()


ALPHAS = ["8", None, [], math.inf, -math.inf, math.nan, HUGE, 1e39, True, 0, -1, {}]
FLAGS = ["false", 2, math.nan, [1], 1, 0, None, "", {}]
ONES = [
    *(({"lora_alpha": value}, "lora_alpha: got ") for value in ALPHAS),
    *(({name: value}, f"{name}: got ") for name in ("use_rslora", "lora_bias", "use_dora") for value in FLAGS),
    *(({"r": value}, "r: got ") for value in (None, "4", 4.0, [4], HUGE, 1 << 31, math.nan, True)),
    ({"r": HUGE, "use_rslora": True}, "r: got "),
    *(({"lora_dropout": value}, "lora_dropout: got ") for value in (None, "0", math.nan, [], HUGE, 2)),
    *(({"bias": value}, "bias: got ") for value in (None, [], True)),
    *(({"target_modules": value}, "target_modules: got .* may take years") for value in SLOW),
    *(({"rank_pattern": {value: 4}}, "rank_pattern: got .* may take years") for value in SLOW),
    *(({"target_modules": value}, "target_modules: got .* a valid regex") for value in TEXTS[-2:]),
]


@pytest.mark.parametrize(("change", "message"), ONES, ids=lambda value: str(value)[:40])
def test_a_field_that_once_loaded_as_something_else_or_ended_in_another_error(tmp_path, change, message):
    config, weights = files(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/{CONFIG}: {message}"):
        load_adapter(model(), written(tmp_path, json.dumps(config | change), weights))


@pytest.mark.parametrize("text", [*DEEP_ONES, '{"r": 4, "r": 8}', "\ufeff", "null", "3", '"r"', '{"r": 1' + "0" * 5000 + "}"])
def test_a_configuration_that_is_no_object(tmp_path, text):
    _, weights = files(tmp_path)
    assert loads(written(tmp_path, text, weights), model()) is None


def test_a_configuration_of_a_terabyte_is_not_read(tmp_path):
    files(tmp_path)
    with (tmp_path / CONFIG).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=f"{CONFIG}: got {1 << 40} bytes, expected at most"):
        load_adapter(model(), tmp_path)


def test_adalora_s_rank_pattern_is_as_long_as_init_r(tmp_path):
    config, weights = files(tmp_path, adalora=True)
    text = json.dumps(config | {"rank_pattern": {"layers.0.q_proj.lora_E": [True] * 4 + [False] * 1000}})
    with pytest.raises(ValueError, match=r"rank_pattern has 1004 values for 'layers.0.q_proj.lora_E', expected init_r = 4"):
        load_adapter(model(), written(tmp_path, text, weights))


# ---- tensors: PEFT's file, and one of each of the other formats ----


def of_other_tools(tensors: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """(tensors, strings of the header) as diffusers, ComfyUI and kohya name them."""
    bare = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    kohya = {}
    for key, t in bare.items():
        path, end = key.split(".lora_")
        name = f"lora_unet_{path.replace('.', '_')}"
        kohya |= {f"{name}.lora_{'down' if end[0] == 'A' else 'up'}.weight": t, f"{name}.alpha": torch.tensor(8.0)}
    own = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {}})}
    return {
        "diffusers": ({f"unet.{key}": t for key, t in bare.items()}, own),
        "comfyui": ({f"diffusion_model.{key}": t for key, t in bare.items()}, {}),
        "kohya": (kohya, {"ss_network_dim": "4"}),
    }


@pytest.mark.filterwarnings("ignore:.* match")
@pytest.mark.parametrize("format", ["peft", "diffusers", "comfyui", "kohya"])
@pytest.mark.seeds(3)
def test_tensors(tmp_path, seed, format):
    draw, (config, raw), into = random.Random(f"{seed} {format}"), files(tmp_path / "peft"), model()
    if format != "peft":
        raw = save(*of_other_tools(load(raw))[format])
    for _ in range(60):
        changed = damaged(raw, draw)
        if format == "peft":
            path = written(tmp_path / "peft", json.dumps(config), changed)
        else:
            path = tmp_path / "lora.safetensors"
            path.write_bytes(changed)
        if loads(path, into) is not None:
            held = load(changed).values()
            adapters = [t for name, t in into.state_dict().items() if ".lora_" in name]
            assert all(
                any(t.numel() == own.numel() and torch.equal(t.to(own).view(own.shape), own) for t in held) for own in adapters
            )
            into = model()


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("gigabytes", [4, 128])
def test_a_tensor_as_large_as_its_file_that_is_another_model_s(tmp_path, format, gigabytes):
    """A file with a hole: what it claims is there, and none of it is read."""
    folder, bytes_ = tmp_path / "peft", gigabytes << 30
    _, raw = files(folder)
    tensors = load(raw) if format == "peft" else of_other_tools(load(raw))["kohya"][0]
    path = folder / WEIGHTS if format == "peft" else tmp_path / "lora.safetensors"
    save_file(tensors, path)
    header, body = split(path.read_bytes())
    key = max(key for key in header if "A.weight" in key or "down" in key)
    header[key] = {"dtype": "F32", "shape": [4, bytes_ // 16], "data_offsets": [len(body), len(body) + bytes_]}
    path.write_bytes(joined(header, body))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + bytes_)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(folder if format == "peft" else path, model()) is None
