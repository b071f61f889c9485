"""NF4Weight to and from bitsandbytes' objects and state-dict keys.

Beside `weight`, the codes, a checkpoint holds `weight.absmax`, `weight.quant_map`, where nested `weight.nested_absmax` and
`weight.nested_quant_map`, and `weight.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON as uint8. The codes may be stored as
another dtype of the same bytes (`quant_storage`), which FSDP wants.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtypes import dtype_name
from .storage import as_bytes, as_storage
from .tables import QUANT_TYPES, code_values
from .weight import DTYPES, NESTED_BLOCKSIZE, NF4Weight

PACKED = "quant_state.bitsandbytes__"
REQUIRED = {"quant_type", "blocksize", "dtype", "shape"}
FLOAT32_MAX = torch.finfo(torch.float32).max
NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


def to_params4bit(w: NF4Weight, storage: torch.dtype, module: Any) -> Any:
    """bitsandbytes' Params4bit over the same bytes, for its `module`."""
    from bitsandbytes.nn import Params4bit

    _, state = w.to_bnb()
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
    for name, tensor in (("", codes), *((f".{name}", tensor) for name, tensor in state.items())):
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{key}{name}: got {_described(tensor)}, expected a dense torch.Tensor")
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
    _check_values(w, state["quant_map"], key)
    return w


def _described(value: Any) -> str:
    return f"a tensor of layout {value.layout}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_values(w: NF4Weight, quant_map: Tensor, key: str) -> None:
    """Raise ValueError for scales that are not finite, and for codes that stand for other values than the format's."""
    for name, tensor in w.tensors().items():
        if tensor.is_floating_point() and not tensor.is_meta and not tensor.isfinite().all():
            raise ValueError(f"{key}: {name} has values that are not finite")
    expected = code_values(w.quant_type, quant_map.device)
    fits = quant_map.is_floating_point() and quant_map.shape == expected.shape
    if fits and (quant_map.is_meta or torch.allclose(quant_map.float(), expected, atol=1e-3)):
        return
    raise ValueError(f"{key}.quant_map: got other values than those of {w.quant_type}, which its codes stand for")


def _scalars(packed: Tensor, key: str) -> dict[str, Any]:
    if packed.is_meta:
        raise ValueError(f"{key}: got a tensor on the meta device, whose values are needed")
    try:
        scalars = json.loads(bytes(packed.flatten().tolist()))
    except (ValueError, TypeError, RecursionError) as error:
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
        ("nested_offset", isinstance(offset, (int, float)) and abs(offset) <= FLOAT32_MAX),  # NaN is not
    )
    for name, fits in checks:
        if not fits:
            raise ValueError(f"{key}: the 4-bit state's {name} is {scalars[name]!r}, which the format does not know")
