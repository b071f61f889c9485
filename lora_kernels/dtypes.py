"""torch's dtypes: their names, and those that are computed with."""

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")
