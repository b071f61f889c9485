"""The demo's text: the same one always, its end held out."""

import torch

from lora_kernels.commands.demo.corpus import read_text, split


def test_default_text_is_long_enough_and_always_the_same():
    assert len(read_text(None)) > 100_000
    assert read_text(None) == read_text(None)


def test_held_out_windows_are_not_trained_on():
    class Characters:
        def __call__(self, text, **options):
            return {"input_ids": list(range(len(text)))}

    corpus = split("x" * 1000, Characters(), length=20, vocabulary=1000)
    assert corpus.train.tolist() == list(range(900))
    assert corpus.held_out.tolist() == [list(range(900 + 20 * i, 920 + 20 * i)) for i in range(5)]
    batch = corpus.batch(20_000, torch.Generator().manual_seed(0))
    assert batch.shape == (20_000, 20)
    assert int(batch.max()) == 899
    assert int(batch.min()) == 0
    assert (batch.diff(dim=1) == 1).all()
