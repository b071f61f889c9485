"""Tuning files damaged at random, by a seed: each is what `tune` writes, or is ignored with the one warning."""

import json
import math
import random
import warnings
from dataclasses import asdict

import pytest

from lora_kernels.backends.triton import tuned
from lora_kernels.backends.triton.tuned import Measured, Tile

NAME, CAPABILITY = "Test GPU 80GB", (8, 0)
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    16,
    32,
    1 << 70,
    10**400,
    0.5,
    32.0,
    math.nan,
    math.inf,
    "",
    "16",
    "project",
    "prefill",
]
VALUES += [[], {}, [1], [[]], [None], {"a": 1}, {"rows": 32}, [{}], "\ud800", "\0", [8, 0], [8.0, 0], [True, False]]
TEXTS = [b"", b"null", b'"x"', b"3", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"NaN", b"1" * 5000]


def content() -> dict:
    """A file with one measurement of each kind."""
    flow = {"direction": "forward", "contraction": "<=4096", "tokens": "<=1024", "choice": "lowrank_product"}
    tile = {"kernel": "project", "arithmetic": "16", "rank": 32, "tile": asdict(Tile(32, 64, 4, 2)), "us": 5.0}
    return {"format": 2, "device": NAME, "capability": list(CAPABILITY), "dataflow": [flow], "tiles": [tile]}


def damaged(draw: random.Random) -> bytes:
    """One value of any depth replaced, removed or added; or a text that is no file, or is cut off."""
    if draw.random() < 0.15:
        return draw.choice(TEXTS)
    data = content()
    (flow,), (row,) = data["dataflow"], data["tiles"]
    place = draw.choice([data, flow, row, row["tile"]])
    name = draw.choice([*place, "unknown"])
    if draw.random() < 0.15:
        place.pop(name, None)
    else:
        place[name] = draw.choice(VALUES)
    text = json.dumps(data).encode()
    return text[: draw.randrange(len(text))] if draw.random() < 0.1 else text


@pytest.mark.seeds(4)
def test_it_is_read_or_ignored_with_one_warning(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned, "COMMITTED", tmp_path / "none")
    path, draw = tuned.user_folder() / tuned.file_name(NAME), random.Random(seed)
    path.parent.mkdir(parents=True)
    for _ in range(250):
        text = damaged(draw)
        path.write_bytes(text)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = tuned.read(NAME, CAPABILITY)
        if caught:
            (one,) = caught
            assert found == Measured()
            assert str(one.message).startswith(f"{path} is ignored (")
            continue
        assert found.source == str(path)
        for (kernel, arithmetic, rank), row in found.tiles.items():
            assert (type(kernel), arithmetic in tuned.ARITHMETICS, rank in tuned.RANKS) == (str, True, True)
            assert tuned.illegal(kernel, arithmetic, row["tile"]) is None
            assert all(type(value) is type(getattr(Tile(1, 1, 1), name)) for name, value in asdict(row["tile"]).items()), text
        assert all(row["choice"] in tuned.DATAFLOWS for row in found.dataflow.values())
