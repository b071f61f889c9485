"""Safetensors files and JSON damaged at random: values of other types, headers that lie, tensors that do not fit."""

import json
import math
import random
import struct
from dataclasses import fields

import torch
from safetensors.torch import load, save

from lora_kernels import LoRAConfig

DEEP, HUGE = 100_000, 10**400
NUMBERS = [0, 1, -1, 2, 4, 8, 1 << 31, 1 << 70, HUGE, -HUGE, 0.5, 8.0, -0.0, 1e-320, 1e39, 1e308, math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "8",
    "false",
    "true",
    "nan",
    "(",
    "all-linear",
    ".*q_proj",
    "\ud800",
    "\0",
    "a{9999999999}",
    "(" * 9999 + ")" * 9999,
]
SLOW = ["([a-z0-9_.]+)+!", "(?:.*)*x", "(?:[a-z]|[a-z.])*!", ".*.*.*.*.*.*.*.*.*.*x", ".?" * 40 + "!", "((.*a){1,9}){1,9}"]
VALUES = [None, True, False, *NUMBERS, *TEXTS, *SLOW, [], {}, [1], [None], [[]], ["q_proj"], [""], ["("], {"a": 1}, [True]]
VALUES += [{name: value} for name in ("q_proj", "(", *SLOW[:2]) for value in (4, None, "4", math.inf, HUGE, [4], True)]
DEEP_ONES = ["[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP]
READ = {field.name for field in fields(LoRAConfig)} - {"init_lora_weights", "modules_to_save"}

SIZES = [1 << 33, 1 << 62, (1 << 64) - 1, 10**30, -1, 0.5, None, "4", True, [], {}]
SHAPES = [[], [0], [4, 8, 1], [1 << 40], [1 << 62, 1 << 62], [-1], None, "4", {}, [0, 1 << 62], [1] * 65 + [4, 8], [8, 4]]
DTYPES = ["F64", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "C64", "U16", "F4", "F8_E8M0", "F99", None, 3, []]
HEADERS = [b"", b"null", b"[]", b'"x"', b"{", b"{}", b"[" * DEEP, b'{"a":' * DEEP, b"\xff" * 9, b" " * 99]
CONFIGS = [None, 3, "x", [], {"a": 1}, {"a": None}]  # then lora_adapter_metadata's
CONFIGS += [{"lora_adapter_metadata": text} for text in ("", "{", "[]", "null", *DEEP_ONES, '{"r": 4, "r": 8}')]
CONFIGS += [{"lora_adapter_metadata": json.dumps({"unet.r": 4, f"unet.{name}": v})} for name in sorted(READ) for v in VALUES]
TENSORS = [
    *(
        lambda t: t * math.nan,
        lambda t: t * math.inf,
        lambda t: t.double() * 1e200 + 1e200,
        lambda t: t.bool(),
        lambda t: t.int(),
    ),
    *(lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to(torch.complex64), lambda t: t.half(), lambda t: t.reshape(-1)),
    *(lambda t: t[None], lambda t: t.reshape(-1)[:0], lambda t: torch.cat([t.reshape(-1)] * 2), lambda t: t[..., None, None]),
    *(lambda t: -t, lambda t: t * 0, lambda t: t.reshape(t.shape[::-1])),
]


def split(raw: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: bytes | dict, body: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def damaged_header(raw: bytes, draw: random.Random) -> bytes:
    header, body = split(raw)
    key = draw.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[key], draw.randrange(9)
    if kind == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = draw.choice(SHAPES)
    elif kind == 2:
        entry["data_offsets"] = draw.choice([[0, draw.choice(SIZES)], [draw.choice(SIZES), 0], [], None, "0", [0], [0, 0]])
    elif kind == 3:  # the rest agrees with it
        entry |= {"shape": [1 << 35], "data_offsets": [0, 1 << 37]}
    elif kind == 4:
        header[draw.choice(["extra", f"{key}x", key.replace("A", "C"), key.replace("layers", "blocks"), ""])] = entry
    elif kind == 5:
        del header[key]
    elif kind == 6:
        return joined(("{" + f"{json.dumps(key)}: {json.dumps(entry)}, " + json.dumps(header)[1:]).encode(), body)
    elif kind == 7:
        return joined(draw.choice(HEADERS), body)
    else:
        return joined(
            json.dumps(header).encode(), body, draw.choice([0, 1, 1 << 27, 1 << 37, 1 << 62, (1 << 64) - 1, len(body)])
        )
    return joined(header, body)


def damaged(raw: bytes, draw: random.Random) -> bytes:
    kind = draw.random()
    if kind < 0.1:
        return raw[: draw.randrange(len(raw))]
    if kind < 0.2:
        changed = bytearray(raw)
        changed[draw.randrange(draw.choice([8, len(raw)]))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind < 0.55:
        return damaged_header(raw, draw)
    header, body = split(raw)
    if kind < 0.75:
        return joined(header | {"__metadata__": draw.choice(draw.choice([CONFIGS[:13], CONFIGS]))}, body)
    tensors = load(raw)
    key = draw.choice(list(tensors))
    tensors[key] = draw.choice(TENSORS)(tensors[key]).contiguous()
    return save(tensors, header.get("__metadata__"))
