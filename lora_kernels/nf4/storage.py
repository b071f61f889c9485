"""4-bit codes as the dtype in which a checkpoint, or FSDP, keeps their bytes (bitsandbytes' `quant_storage`)."""

import torch
from torch import Tensor

STORAGES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)


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
