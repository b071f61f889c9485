"""lora-kernels convert and merge: files in, files out, and one line for what cannot be."""

import json

import pytest
import torch
from lora_files_case import (
    adapted,
    close,
    dotted,
    factors,
    kohya,
    linear_paths,
    output,
    saved,
    second_text_encoder,
    text_encoder,
    unet,
    unscaled,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_cli import assert_one_line_error

from lora_kernels import add_lora, load_adapter, lora_parameters, save_adapter

TARGETS = ("to_q", "to_v")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline's directory, of which the configurations are read alone."""
    folder = tmp_path_factory.mktemp("pipeline")
    parts = {"unet": unet(), "text_encoder": text_encoder(), "text_encoder_2": second_text_encoder()}
    for name, part in parts.items():
        part.config.architectures = [type(part).__name__] if name != "unet" else None
        part.save_config(folder / name) if name == "unet" else part.config.save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionXLPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index | {name: ["library", "class"] for name in parts}))
    return folder


@pytest.fixture
def made():
    base = unet()
    return factors(base, linear_paths(base, *TARGETS))


def test_around_all_formats_the_function_stays(run, tmp_path, pipeline, made):
    base = unet()
    file = saved(tmp_path / "in.safetensors", kohya(made, "lora_unet_"), {"ss_network_dim": "3"})
    formats = ("diffusers", "peft", "diffusers", "kohya")
    for number, format in enumerate(formats):
        target = tmp_path / (f"{number}" if format == "peft" else f"{number}.safetensors")
        model = ["--model", pipeline] if number == 0 else []
        code, out, err = run("convert", file, target, "--format", format, *model)
        assert (code, err) == (0, ""), err
        assert out == f"{target}: {format}, {len(made)} layers of the unet\n"
        load_adapter(ours := unet(), target)
        close(output(ours), output(adapted(base, made)))
        file = target
    first, last = load_file(tmp_path / "in.safetensors"), load_file(file)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_a_peft_adapter_of_a_language_model_is_one_file(run, tmp_path, made):
    theirs = get_peft_model(unet(), LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=list(TARGETS)))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0, 0.3)
    theirs.save_pretrained(tmp_path / "peft")
    assert run("convert", tmp_path / "peft", tmp_path / "a.safetensors", "--format", "kohya", "--json", "-")[0] == 0
    load_adapter(ours := unet(), tmp_path / "a.safetensors")
    close(output(ours), output(theirs.base_model.model))


def test_the_json_has_the_ranks(run, tmp_path):
    tensors = dotted(unscaled({"a.b": (torch.ones(2, 4), torch.ones(3, 2), 2.0)}), "transformer.")
    file = saved(tmp_path / "in.safetensors", tensors)
    target = tmp_path / "out.safetensors"
    code, out, _ = run("convert", file, target, "--format", "kohya", "--json", "-")
    assert (code, json.loads(out)) == (0, {"output": str(target), "format": "kohya", "ranks": {"transformer": {"a.b": 2}}})
    assert set(load_file(target)) == {f"lora_transformer_a_b.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}


def test_the_sum_of_files_is_theirs(run, tmp_path, pipeline, made):
    base, text = unet(), text_encoder()
    other = factors(base, linear_paths(base, "to_v", "to_out.0"), seed=8)
    words = factors(text, linear_paths(text, "q_proj"))
    one = saved(tmp_path / "one.safetensors", kohya(made, "lora_unet_"))
    two = saved(tmp_path / "two.safetensors", kohya(other, "lora_unet_") | kohya(words, "lora_te1_"))
    target = tmp_path / "sum.safetensors"
    options = ("--weight", "0.5", "--weight", "-1.5", "--format", "diffusers", "--model", pipeline, "--output", target)
    code, out, _ = run("merge", one, two, *options)
    assert (code, out) == (0, f"{target}: diffusers, 24 layers of the unet, 2 layers of the text_encoder\n")
    ours = {"unet": unet(), "text_encoder": text_encoder()}
    load_adapter(ours, target)
    scaled = [{path: (A, B, w * alpha) for path, (A, B, alpha) in each.items()} for each, w in ((made, 0.5), (other, -1.5))]
    close(output(ours["unet"]), output(adapted(adapted(base, scaled[0]), scaled[1])))
    weighted = {path: (A, B, -1.5 * alpha) for path, (A, B, alpha) in words.items()}
    close(output(ours["text_encoder"]), output(adapted(text, weighted)))


def test_what_cannot_be_is_one_line(run, tmp_path, pipeline, made):
    file, out = saved(tmp_path / "in.safetensors", kohya(made, "lora_unet_")), tmp_path / "out.safetensors"
    key = "'lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight'"
    for arguments, parts in (
        ((file, out, "--format", "kohya"), (key, "kohya's", "pass --model DIR")),
        ((file, out, "--format", "comfyui"), ("--format: got 'comfyui', expected peft, diffusers, kohya",)),
        ((file, out, "--format", "peft"), ("expected a directory for --format peft",)),
        ((file, tmp_path / "out", "--format", "kohya"), ("expected a path that ends in .safetensors",)),
        ((tmp_path / "no", out, "--format", "kohya"), ("no", "no such file")),
        ((file, out, "--format", "kohya", "--model", tmp_path), ("--model: cannot read", "config.json")),
        ((file, out, "--format", "kohya", "--model", pipeline / "text_encoder"), (key, "no module of CLIPTextModel")),
    ):
        assert_one_line_error(run("convert", *arguments), *parts)
    (tmp_path / "config.json").write_text('{"_class_name": "loaders"}')
    arguments = (file, out, "--format", "kohya", "--model", tmp_path)
    assert_one_line_error(run("convert", *arguments), "is a 'loaders', expected a model of diffusers")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": "x"}')
    assert_one_line_error(run("convert", *arguments), "cannot make UNet2DConditionModel from")
    merge = ("merge", file, file, "--format", "kohya", "--output", out, "--model", pipeline)
    for weights in (("1",), ("1", "0"), ("1", "nan"), ("1", "inf")):
        options = [option for weight in weights for option in ("--weight", weight)]
        assert_one_line_error(run(*merge, *options), "--weight: got", "for each of 2 files")
    dora = unet()
    add_lora(dora, LoraConfig(target_modules=["to_q"], use_dora=True))
    assert list(lora_parameters(dora))
    magnitudes = save_adapter(dora, tmp_path / "dora.safetensors", format="diffusers")
    arguments = ("merge", magnitudes, "--format", "kohya", "--output", out)
    assert_one_line_error(run(*arguments), "has DoRA's magnitude beside", "merge it into a model")
    assert not out.exists()
