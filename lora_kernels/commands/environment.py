"""What a measurement depends on: versions, devices, CPU capabilities, threads and the commit of this package."""

import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .console import format_bytes

PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "bitsandbytes")
EXTENSIONS = ("_cpu", "_C")  # those of setup.py that were built
CHECKOUT = Path(__file__).resolve().parents[2]  # the folder that holds lora_kernels/
CPU_CAPABILITIES = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_fp16")


def environment() -> dict[str, Any]:
    """Everything below, as JSON-ready values."""
    return {
        "lora_kernels": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "extensions": [name for name in EXTENSIONS if importlib.util.find_spec(f"lora_kernels.{name}")],
        "cpu": cpu(),
        "gpus": gpus(),
    }


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """`git describe` of the checkout that this package runs from, "-dirty" if changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    if not (CHECKOUT / ".git").exists():  # installed: a repository around site-packages is not ours
        return None
    return _stdout(command, cwd=CHECKOUT).strip() or None


def _stdout(command: list[str], cwd: Path | None = None) -> str:
    """What `command` prints; "" where it cannot run, or takes longer than 10 s."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu() -> dict[str, Any]:
    """The CPU's name, torch's threads and vector level, and the instructions that decide how fast bf16 products are."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    capabilities = {name: bool(found[name]) for name in CPU_CAPABILITIES if name in found}
    return {
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "vector_level": torch.backends.cpu.get_cpu_capability(),
        "capabilities": capabilities,
        "native_bf16_matmul": _native_bf16(capabilities),
    }


def _native_bf16(capabilities: dict[str, bool]) -> bool | None:
    """Whether bf16 products have instructions of their own (None: this torch cannot tell); else fp32 is faster."""
    known = [capabilities[name] for name in ("avx512_bf16", "amx_tile") if name in capabilities]
    return any(known) if known else None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Each CUDA device: name, compute capability, memory, number of SMs, L2 bytes, and the driver."""
    if not torch.cuda.is_available():
        return []
    driver = _driver_version()
    result = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        result.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "sms": properties.multi_processor_count,
                "l2_bytes": getattr(properties, "L2_cache_size", None),
                "driver": driver,
                "cuda": torch.version.cuda,
            }
        )
    return result


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = _stdout(command).split()
    return lines[0] if lines else None


def environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `environment()` found, as people read it: (name, value)."""
    cpu = found["cpu"]
    capabilities = ", ".join(name for name, there in cpu["capabilities"].items() if there) or "none known"
    rows = [
        ("lora_kernels", f"{found['lora_kernels']}, commit {found['commit'] or 'unknown'}"),
        ("Python", f"{found['python']}, {found['platform']}"),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("CPU", f"{cpu['name']}, {cpu['threads']} threads, {cpu['vector_level']}"),
        ("CPU instructions", capabilities),
        ("extensions", ", ".join(found["extensions"]) or "none was built"),
        ("bf16 products on the CPU", f"native: {yes_no(cpu['native_bf16_matmul'])}"),
    ]
    if not found["gpus"]:
        rows.append(("CUDA devices", "none"))
    for index, gpu in enumerate(found["gpus"]):
        memory = format_bytes(gpu["memory_bytes"])
        name = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}"
        rows.append((f"cuda:{index}", f"{name}, {memory}, driver {gpu['driver']}"))
    return rows


def yes_no(value: Any) -> str:
    """A bool or None as a word; a string stays."""
    return {True: "yes", False: "no", None: "unknown"}.get(value, value) if not isinstance(value, str) else value
