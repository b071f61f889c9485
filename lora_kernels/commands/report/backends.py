"""`lora-kernels report`: versions, devices, CPU capabilities, and for each backend whether it is used here, or why not."""

from typing import Any

import torch

from ...dtypes import dtype_name
from ...functional.linear import backend_report
from ..console import Output
from ..environment import environment, environment_rows, yes_no


def run(out: Output) -> dict[str, Any]:
    """Print the two tables and return what they show."""
    found: dict[str, Any] = environment()
    cases = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    cases += [(f"cuda:{i}", torch.bfloat16) for i in range(len(found["gpus"]))]
    found["backends"] = [
        {"device": device, "dtype": dtype_name(dtype), **vars(row)}
        for device, dtype in cases
        for row in backend_report(torch.empty(16, 64, device=device, dtype=dtype))
    ]
    out.table("Environment", ("", "value"), environment_rows(found))
    columns = ("device", "dtype", "backend", "usable", "used", "reason")
    rows = [[yes_no(row[column]) for column in columns] for row in found["backends"]]
    out.table("Backends for a LoRA layer", columns, rows)
    return found
