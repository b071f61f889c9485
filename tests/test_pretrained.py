"""Models from local directories: each kind of damage has its line; the default model is converted once, whatever ends it."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import tiny_llama
import torch

from lora_kernels.commands import pretrained
from lora_kernels.commands.console import CommandError

pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return tiny_llama.write(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(sound, tmp_path):
    """A copy of a sound model's directory, to be damaged."""
    return shutil.copytree(sound, tmp_path / "model")


def without_a_tensor(directory):
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def cut(name):
    """A damage: half of the file is lost."""

    def damage(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])

    return damage


def other_config(**changes):
    """A damage: a configuration that does not fit the weights."""

    def damage(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("model.safetensors"), "cannot load weights from .*: .*"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b""), "cannot load weights from"),
        (lambda directory: (directory / "model.safetensors").unlink(), "cannot load weights from"),
        (without_a_tensor, r"has no values for 1 tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"),
        (other_config(num_hidden_layers=3), "has no values for 9 tensors"),
        (other_config(intermediate_size=96), "cannot load weights from"),
        (cut("config.json"), "cannot load weights from"),
        (other_config(model_type="t5"), "cannot load weights from"),
    ],
)
def test_damaged_weights_are_an_error_of_one_line(model, damage, message):
    pretrained.load_model(model, torch.float32, CPU)
    damage(model)
    with pytest.raises(CommandError, match=f"^--model: .*{message}"):
        pretrained.load_model(model, torch.float32, CPU)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut("config.json"), "JSON"),
        (other_config(model_type="no such kind"), "no such kind"),
        (other_config(model_type="t5"), "T5Config"),
        (other_config(hidden_size="many"), "Validation error for field 'hidden_size': .*expected int, got str"),
        (lambda directory: (directory / "config.json").write_text("[]"), "."),
    ],
)
def test_what_is_no_causal_model_is_an_error_of_one_line(model, damage, reason):
    pretrained.meta_model(model)
    damage(model)
    with pytest.raises(CommandError, match=f"^--model: .* is no causal language model: .*{reason}") as found:
        pretrained.meta_model(model)
    assert len(str(found.value).partition("language model: ")[2]) <= pretrained.REASON


@pytest.mark.parametrize("damage", [cut("tokenizer.json"), lambda directory: (directory / "tokenizer.json").write_text("{}")])
def test_a_damaged_tokenizer_is_an_error_of_one_line(model, damage):
    pretrained.load_tokenizer(model)
    damage(model)
    with pytest.raises(CommandError, match=r"^--model: cannot load a tokenizer from"):
        pretrained.load_tokenizer(model)


def test_too_little_memory_is_not_the_models_fault(model, monkeypatch):
    def load(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes.")

    monkeypatch.setattr(pretrained._transformers().AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(RuntimeError, match="can't allocate"):
        pretrained.load_model(model, torch.float32, CPU)


class TestDefaultModel:
    """The conversion of the default model into the user's cache, with the conversion itself replaced."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(pretrained, "default_model_source", lambda: tmp_path / "model.gguf")
        return tmp_path / "cache" / "lora_kernels"

    def test_it_is_converted_once(self, cache, monkeypatch):
        calls = []

        def convert(source, target):
            calls.append(source)
            (target / "config.json").write_text("{}")

        monkeypatch.setattr(pretrained, "_convert_gguf", convert)
        assert not pretrained.default_model_is_cached()
        directory = pretrained.default_model_directory()
        assert directory == cache / pretrained.DEFAULT_MODEL
        assert (directory / "config.json").is_file()
        assert pretrained.default_model_directory() == directory
        assert len(calls) == 1
        assert contents(cache) == {directory.name}

    def test_an_interrupted_conversion_leaves_nothing(self, cache, monkeypatch):
        def interrupted(source, target):
            (target / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(pretrained, "_convert_gguf", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrained.default_model_directory()
        assert contents(cache) == set()
        assert not pretrained.default_model_is_cached()

    @pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
    def test_what_a_killed_conversion_leaves_the_next_one_removes(self, cache, monkeypatch, tmp_path, how):
        code = """if True:
            import os, signal, sys
            from lora_kernels.commands import pretrained
            def killed(source, target):
                (target / "model.safetensors").write_bytes(b"half")
                os.kill(os.getpid(), getattr(signal, sys.argv[1]))
                signal.pause()
            pretrained.default_model_source, pretrained._convert_gguf = lambda: None, killed
            pretrained.default_model_directory()"""
        ended = subprocess.run([sys.executable, "-c", code, how], timeout=120)
        assert ended.returncode == -getattr(signal, how)
        assert contents(cache) == {f".{pretrained.DEFAULT_MODEL}.unfinished"}
        assert not pretrained.default_model_is_cached()
        monkeypatch.setattr(pretrained, "_convert_gguf", lambda source, target: (target / "config.json").write_text("{}"))
        directory = pretrained.default_model_directory()
        assert contents(cache) == {directory.name}
        assert [file.name for file in directory.iterdir()] == ["config.json"]


def contents(cache):
    """Names in the cache, beside the lock's."""
    return {path.name for path in cache.iterdir()} - {f".{pretrained.DEFAULT_MODEL}.lock"}
