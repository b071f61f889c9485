"""The demo's text as token windows: random ones to train on, fixed ones at the end of the text held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import CommandError

HELD_OUT_FRACTION = 0.1
MAX_HELD_OUT_WINDOWS = 16
MIN_CHARACTERS = 200  # below this no tokenizer yields enough; found before the model is loaded


@dataclass(frozen=True)
class Corpus:
    """Token ids: `train` as one long sequence, `held_out[windows, length]`."""

    train: Tensor
    held_out: Tensor
    length: int

    def batch(self, windows: int, generator: torch.Generator) -> Tensor:
        """[windows, length] ids from random places of the training text."""
        starts = torch.randint(len(self.train) - self.length + 1, (windows,), generator=generator)
        return torch.stack([self.train[start : start + self.length] for start in starts.tolist()])


def read_text(path: Path | None) -> str:
    """The text of `path`, or Python's own help topics. Raises CommandError for what cannot be trained on."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    if not path.is_file():
        raise CommandError(f"--text: got {path}, which is no file; pass a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"--text: got {path}, which is not UTF-8 at byte {error.start}; convert it") from error
    except OSError as error:
        raise CommandError(f"--text: cannot read {path}: {error.strerror}") from error
    if len(text.strip()) < MIN_CHARACTERS:
        raise CommandError(f"--text: got {len(text.strip())} characters in {path}, expected at least {MIN_CHARACTERS}")
    return text


def split(text: str, tokenizer: Any, length: int, vocabulary: int) -> Corpus:
    """`text` as tokens, the last tenth held out (at most 16 windows). Raises CommandError for too short a text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    held_out_tokens = max(length, int(len(ids) * HELD_OUT_FRACTION))
    boundary = len(ids) - held_out_tokens
    if boundary < length:
        raise CommandError(
            f"--text: got {len(ids)} tokens, expected at least {2 * length} for windows of {length}; "
            "pass a longer text or fewer --tokens-per-step"
        )
    if int(ids.max()) >= vocabulary:
        raise CommandError(
            f"--model: the tokenizer yields id {int(ids.max())}, the model has {vocabulary} embeddings; "
            "pass a directory where they belong together"
        )
    windows = min(MAX_HELD_OUT_WINDOWS, held_out_tokens // length)
    held_out = ids[boundary : boundary + windows * length].reshape(windows, length)
    return Corpus(ids[:boundary], held_out, length)
