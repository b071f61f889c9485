"""What each run of the benchmark says first: what its numbers depend on, and which peers are not there."""

import time
from typing import Any

import torch

from ..console import Output
from ..environment import environment

Refusals = list[dict[str, str]]


def new_header(device: torch.device, repeats: int, seed: int, output: Output) -> dict[str, Any]:
    """What a run's numbers depend on, printed as one line."""
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    header = {**environment(), "device": _device_name(device), "time": started, "repeats": repeats, "seed": seed}
    output.print(_header_line(header), markup=False)
    return header


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]["name"]


def _header_line(header: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in header["packages"].items() if version)
    return (
        f"{header['device']} · Python {header['python']} · {packages} · "
        f"lora_kernels {header['lora_kernels']} commit {header['commit'] or 'unknown'} · {header['cpu']['threads']} CPU threads"
    )


def print_refusals(refusals: Refusals, output: Output) -> None:
    """A line for each peer that was asked for and not measured."""
    for refusal in refusals:
        case = "" if refusal["case"] == "all" else f" ({refusal['case']})"
        output.print(f"peer not measured: {refusal['peer']}{case}: {refusal['reason']}", markup=False)
