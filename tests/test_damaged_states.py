"""4-bit state dicts damaged at random, by a seed: each loads as what it says, or raises and leaves the model as it was."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, add_lora

DEEP, PACKED = 100_000, "0.weight.quant_state.bitsandbytes__nf4"
JSON = [
    None,
    True,
    False,
    0,
    -1,
    3,
    64,
    1 << 70,
    10**400,
    -(10**400),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "64",
    "nf4",
    "float32",
]
JSON += [[], {}, [1], [[]], [64, -64], [64.0, 64], [True, 64], [1 << 62, 1 << 62], {"a": 1}, "[" * 50]
TEXTS = [b"", b"null", b'"text"', b"3", b"[]", b"{", b"\xff\xfe", b"[" * DEEP, b'{"a":' * DEEP, b"{}" * 3, b"NaN"]


def bytes_of(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def changed_json(value: Tensor, draw: random.Random) -> Tensor:
    scalars = json.loads(bytes(value.tolist()))
    name = draw.choice([*scalars, "unknown"])
    if draw.random() < 0.2:
        scalars.pop(name, None)
    else:
        scalars[name] = draw.choice(JSON)
    return bytes_of(json.dumps(scalars).encode())


def a_byte(value: Tensor, draw: random.Random) -> Tensor:
    changed = value.clone().view(-1).contiguous().view(torch.uint8)
    if len(changed):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return changed.view(value.dtype).view(value.shape)


TENSOR_CHANGES: list[Callable[[Tensor, random.Random], Any]] = [
    lambda t, draw: draw.choice([None, 3, "text", [1.0], {}, b"bytes", t.tolist()]),
    lambda t, draw: t.reshape(-1)[: draw.randrange(t.numel() + 1)],
    lambda t, draw: torch.cat([t.reshape(-1), t.reshape(-1)[:1]]),
    lambda t, draw: t[None],
    lambda t, draw: t.reshape(-1, 1),
    lambda t, draw: t.to(draw.choice([torch.float64, torch.float16, torch.int8, torch.int64, torch.bool, torch.complex64])),
    lambda t, draw: t.to("meta"),
    lambda t, draw: t.to_sparse() if t.numel() else t,
    lambda t, draw: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,
    lambda t, draw: torch.full_like(t, float("nan") if t.is_floating_point() else 255),
    lambda t, draw: torch.full_like(t, float("inf") if t.is_floating_point() else 0),
    a_byte,
]


def damaged(state: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    state = dict(state)
    for key in draw.sample(list(state), draw.choice([1, 1, 1, 2, 3])):
        kind, packed = draw.random(), "quant_state" in key
        if kind < 0.1:
            del state[key]
        elif kind < 0.15:
            state[key + draw.choice([".absmax", ".unknown", "x"])] = state[key]
        elif packed and kind < 0.75:
            state[key] = changed_json(state[key], draw) if kind < 0.6 else bytes_of(draw.choice(TEXTS))
        else:
            state[key] = draw.choice(TENSOR_CHANGES)(state[key], draw)
    return state


def model() -> nn.Module:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64))
    add_lora(found, LoRAConfig(r=2, target_modules=["0", "1"]), quantize="nf4")
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("0.weight", None),
        ("0.weight", [1, 2]),
        ("0.weight", torch.ones(2048, 1).to_sparse()),
        ("0.weight.absmax", "text"),
        ("0.weight.quant_map", torch.ones(16)),
        ("0.weight.nested_absmax", torch.full((1,), float("nan"))),
        (PACKED, bytes_of(b'"text"')),
        (PACKED, bytes_of(b"[" * DEEP)),
        (PACKED, {"nested_offset": 10**400}),
        (PACKED, {"blocksize": True}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_once_passed_or_ended_in_another_error(key, value):
    whole = model()
    state, before = values(whole), values(whole)
    if isinstance(value, dict):
        value = bytes_of(json.dumps(json.loads(bytes(state[key].tolist())) | value).encode())
    with pytest.raises(ValueError, match=r"^0\.weight"):
        whole.load_state_dict({**state, "1.bias": torch.ones(128), key: value})
    assert all(torch.equal(t, before[name]) for name, t in whole.state_dict().items())


@pytest.mark.seeds(8)
def test_it_loads_or_nothing_changes(seed):
    draw, whole, x = random.Random(seed), model(), torch.ones(2, 64)
    state, before = values(whole), values(whole)
    for number in range(40):
        changed = damaged(state, draw)
        try:
            whole.load_state_dict(changed)
        except ValueError:
            after = whole.state_dict()
            assert after.keys() == before.keys(), number
            assert all(torch.equal(after[name], t) for name, t in before.items()), number
            continue
        except RuntimeError as error:  # PyTorch's own, of what is no 4-bit weight: it has loaded the rest
            if "Error(s) in loading state_dict" not in str(error):
                raise
        whole(x)
        whole = model()
