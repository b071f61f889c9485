"""NF4Weight to and from bitsandbytes' objects and state-dict keys.

Beside `weight`, the codes, a checkpoint holds `weight.absmax`, `weight.quant_map`, where nested `weight.nested_absmax` and
`weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON as uint8. The codes may be stored as
another dtype of the same bytes (`quant_storage`), which FSDP wants.
"""

import json
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from .tables import QUANT_TYPES, code_values
from .weight import DTYPES, NESTED_BLOCKSIZE, NF4Weight

STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
PACKED = "quant_state.bitsandbytes__"
REQUIRED = {"quant_type", "blocksize", "dtype", "shape"}
NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


def as_bytes(codes: Tensor) -> Tensor:
    """uint8[bytes] of codes stored as any dtype, sharing their memory."""
    if codes.dtype not in STORAGES:
        raise TypeError(f"codes: got dtype {codes.dtype}, expected one of {', '.join(map(str, STORAGES))}")
    if not codes.is_contiguous() and not codes.T.is_contiguous():
        raise ValueError(f"codes: got strides {codes.stride()}, expected contiguous memory; use codes.contiguous()")
    plain = codes.detach()
    if type(plain) is not Tensor:  # torch.compile cannot trace as_subclass
        plain = plain.as_subclass(Tensor)
    return plain.reshape(-1).view(torch.uint8)


def as_storage(codes: Tensor, storage: torch.dtype) -> Tensor:
    """codes[bytes] as `storage`[·, 1], as bitsandbytes keeps them. Raises ValueError if the bytes do not divide."""
    if storage not in STORAGES:
        raise ValueError(f"quant_storage: got {storage}, expected one of {', '.join(map(str, STORAGES))}")
    if len(codes) % storage.itemsize:
        raise ValueError(f"quant_storage: got {storage} for {len(codes)} bytes, expected a multiple of {storage.itemsize}")
    return codes.view(storage)[:, None]


def from_bnb(codes: Tensor, quant_state: Any = None) -> NF4Weight:
    """See NF4Weight.from_bnb."""
    state = getattr(codes, "quant_state", None) if quant_state is None else quant_state
    if not isinstance(codes, Tensor) or state is None:
        raise TypeError(
            f"codes: got {type(codes).__name__} without a quant_state, expected a quantised Params4bit, or codes and their "
            "QuantState; a Linear4bit is quantised by moving it to a device"
        )
    if getattr(state, "packing_format_for_cpu", False):
        return _unpack_for_cpu(codes, state)
    nested = state.state2 if state.nested else None
    if nested is not None and nested.blocksize != NESTED_BLOCKSIZE:
        raise ValueError(f"quant_state: got nested blocks of {nested.blocksize}, expected {NESTED_BLOCKSIZE}")
    w = NF4Weight(
        as_bytes(codes),
        state.absmax if nested is not None else state.absmax.float(),
        None if nested is None else nested.absmax,
        None if nested is None else nested.code,
        None if nested is None else state.offset.reshape(()),
        torch.Size(state.shape),
        state.dtype,
        state.blocksize,
        state.quant_type,
    )
    w.check()
    return w


def _unpack_for_cpu(codes: Tensor, state: Any) -> NF4Weight:
    """The codes in rows again, where bitsandbytes has regrouped them for its AVX512 kernel; absmax as that kernel reads it."""
    warnings.warn(
        "bitsandbytes repacked this weight for its CPU kernel in evaluation and rounded its absmax to bfloat16; "
        "that is what is taken over, in a copy. Convert a model before its first evaluation to share its bytes",
        stacklevel=4,
    )
    N, K = state.shape
    group = codes.detach().as_subclass(Tensor).view(-1, 32)  # bytes of 32 elements in the low and 32 in the high nibbles
    values = torch.cat([group & 15, group >> 4], 1).view(N // 32, K // 2, 32, 2).transpose(1, 2).reshape(-1, 2)
    absmax = state.absmax.T.reshape(-1).float()
    packed = (values[:, 0] << 4) | values[:, 1]
    shape, dtype = torch.Size(state.shape), state.original_dtype
    return NF4Weight(packed, absmax, None, None, None, shape, dtype, state.blocksize, state.quant_type)


def to_bnb(w: NF4Weight) -> tuple[Tensor, Any]:
    """See NF4Weight.to_bnb. Raises ImportError where bitsandbytes is not installed."""
    from bitsandbytes.functional import QuantState

    state2 = None
    if w.nested:
        state2 = QuantState(w.nested_absmax, code=w.nested_map, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    state = QuantState(
        absmax=w.absmax,
        shape=w.shape,
        code=code_values(w.quant_type, w.device).clone(),  # a tensor of its own: writers refuse shared ones
        blocksize=w.blocksize,
        quant_type=w.quant_type,
        dtype=w.dtype,
        offset=w.nested_offset,
        state2=state2,
    )
    return w.codes[:, None], state


def to_params4bit(w: NF4Weight, storage: torch.dtype, module: Any) -> Any:
    """bitsandbytes' Params4bit over the same bytes, for its `module`."""
    from bitsandbytes.nn import Params4bit

    _, state = to_bnb(w)
    module.quant_state = state
    return Params4bit(
        as_storage(w.codes, storage),
        requires_grad=False,
        quant_state=state,
        blocksize=w.blocksize,
        compress_statistics=w.nested,
        quant_type=w.quant_type,
        quant_storage=storage,
        module=module,
        bnb_quantized=True,
    )


def to_state(w: NF4Weight) -> dict[str, Tensor]:
    """What a state dict holds beside `weight`, by the end of its key."""
    offset = 0.0 if w.nested_offset is None or w.device.type == "meta" else w.nested_offset.item()
    scalars: dict[str, Any] = {"quant_type": w.quant_type, "blocksize": w.blocksize, "dtype": dtype_name(w.dtype)}
    scalars["shape"] = list(w.shape)
    state = {"absmax": w.absmax, "quant_map": code_values(w.quant_type, w.device).clone()}
    if w.nested_absmax is not None and w.nested_map is not None:
        scalars |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32", "nested_offset": offset}
        state |= {"nested_absmax": w.nested_absmax, "nested_quant_map": w.nested_map.clone()}
    state[PACKED + w.quant_type] = torch.tensor(list(json.dumps(scalars).encode()), dtype=torch.uint8, device=w.device)
    return state


def from_state(codes: Tensor, state: Mapping[str, Tensor], key: str = "weight") -> NF4Weight:
    """NF4Weight of `codes` and what a state dict holds beside them. Raises ValueError, naming `key`, for what does not fit."""
    packed = [name for name in state if name.startswith(PACKED)]
    if len(packed) != 1 or packed[0].removeprefix(PACKED) not in QUANT_TYPES:
        raise ValueError(f"{key}: got {packed or 'nothing'}, expected one key {key}.{PACKED}nf4 or …fp4")
    scalars = _scalars(state[packed[0]], f"{key}.{packed[0]}")
    nested = "nested_absmax" in state
    tensors = {"absmax", "quant_map", packed[0]} | ({"nested_absmax", "nested_quant_map"} if nested else set())
    fields = REQUIRED | (NESTED if nested else set())
    for got, expected, where in ((set(state), tensors, key), (set(scalars), fields, f"{key}.{packed[0]}")):
        if got != expected:
            missing, unknown = sorted(expected - got), sorted(got - expected)
            raise ValueError(f"{where}: the 4-bit state lacks {missing} and has unknown {unknown}")
    _check_scalars(scalars, packed[0].removeprefix(PACKED), key)
    offset = torch.tensor(float(scalars["nested_offset"]), device=codes.device) if nested else None
    try:
        w = NF4Weight(
            as_bytes(codes),
            state["absmax"],
            state.get("nested_absmax"),
            state.get("nested_quant_map"),
            offset,
            torch.Size(scalars["shape"]),
            getattr(torch, scalars["dtype"]),
            scalars["blocksize"],
            scalars["quant_type"],
        )
        w.check()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
    return w


def _scalars(packed: Tensor, key: str) -> dict[str, Any]:
    if packed.is_meta:
        raise ValueError(f"{key}: got a tensor on the meta device, whose values are needed")
    try:
        scalars = json.loads(bytes(packed.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key}: got {packed.dtype}{list(packed.shape)}, expected JSON in uint8: {error}") from error
    if not isinstance(scalars, dict):
        raise ValueError(f"{key}: got JSON {scalars!r}, expected an object")
    return scalars


def _check_scalars(scalars: dict[str, Any], quant_type: str, key: str) -> None:
    """Raise ValueError unless the JSON's values have the types and values that the format knows."""
    shape, offset = scalars["shape"], scalars.get("nested_offset", 0.0)
    checks = (
        ("quant_type", scalars["quant_type"] == quant_type),
        ("blocksize", type(scalars["blocksize"]) is int),
        ("dtype", scalars["dtype"] in map(dtype_name, DTYPES)),
        ("shape", isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)),
        ("nested_blocksize", scalars.get("nested_blocksize", NESTED_BLOCKSIZE) == NESTED_BLOCKSIZE),
        ("nested_dtype", scalars.get("nested_dtype", "float32") == "float32"),
        ("nested_offset", isinstance(offset, (int, float)) and math.isfinite(offset)),
    )
    for name, fits in checks:
        if not fits:
            raise ValueError(f"{key}: the 4-bit state's {name} is {scalars[name]!r}, which the format does not know")
