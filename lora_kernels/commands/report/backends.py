"""`lora-kernels report`: versions, devices, CPU capabilities, and for each backend whether it is used here, or why not."""

from typing import Any

import torch

from ...dtypes import dtype_name
from ...functional.linear import backend_report
from ..console import Output, format_bytes
from ..environment import environment


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
    out.table("Environment", ("", "value"), _environment_rows(found))
    columns = ("device", "dtype", "backend", "usable", "used", "reason")
    rows = [[_yes_no(row[column]) for column in columns] for row in found["backends"]]
    out.table("Backends for a LoRA layer", columns, rows)
    return found


def _environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = found["cpu"]
    capabilities = ", ".join(name for name, there in cpu["capabilities"].items() if there) or "none known"
    rows = [
        ("lora_kernels", f"{found['lora_kernels']}, commit {found['commit'] or 'unknown'}"),
        ("Python", f"{found['python']}, {found['platform']}"),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("CPU", f"{cpu['name']}, {cpu['threads']} threads, {cpu['vector_level']}"),
        ("CPU instructions", capabilities),
        ("extensions", ", ".join(found["extensions"]) or "none was built"),
        ("bf16 products on the CPU", f"native: {_yes_no(cpu['native_bf16_matmul'])}"),
    ]
    if not found["gpus"]:
        rows.append(("CUDA devices", "none"))
    for index, gpu in enumerate(found["gpus"]):
        memory = format_bytes(gpu["memory_bytes"])
        name = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}"
        rows.append((f"cuda:{index}", f"{name}, {memory}, driver {gpu['driver']}"))
    return rows


def _yes_no(value: Any) -> str:
    return {True: "yes", False: "no", None: "unknown"}.get(value, value) if not isinstance(value, str) else value
