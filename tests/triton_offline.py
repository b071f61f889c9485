"""Compile the Triton backend's kernels for GPUs that are not there, and count what the machine code holds.

The backend itself is called, on CPU tensors, while Triton believes in a device of the wanted capability and launches are
only compiled: what is recorded is exactly what a call would launch. `PYTHONPATH=. python tests/triton_offline.py` writes
the table lora_kernels/backends/triton/kernels.json; tests/test_triton_offline.py compares with it.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_offline_calls import FEW, calls

TABLE = Path(__file__).parents[1] / "lora_kernels/backends/triton/kernels.json"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB for one program, CUDA C++ Programming Guide
WARP_LIMIT = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # of one processor
PAIRS = ("bf16 bf16", "fp16 fp16", "fp32 fp32", "fp32 fp32 tf32", "bf16 fp32", "fp16 fp32")
MMA = r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA2?)\b"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)")


def instructions(sass: str) -> tuple[list[str], list[str]]:
    """(all instructions, those of the smallest loop that multiplies), the latter all of them without such a loop."""
    found: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if match := re.match(r"^(\.L_\w+):", line):
            labels[match[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            found.append(match[1])
            target = re.search(r"`\((\.L_\w+)\)", match[2])
            if match[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(found)))
    bodies = [found[start:end] for start, end in loops if any(re.match(MMA, name) for name in found[start:end])]
    return found, min(bodies, key=len, default=found)


def ctas_per_sm(capability: int, registers: int, shared: int, warps: int) -> int:
    """How many programs a processor holds at once: registers come by eight, and each program reserves 1 KiB."""
    of_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, 1024 * (SHARED_LIMIT[capability] + 1) // (shared + 1024), WARP_LIMIT[capability] // warps)


def statistics(kernel: Any, capability: int, options: dict[str, Any]) -> dict[str, Any]:
    """What one compiled kernel needs, from its machine code; per element and barriers: of the main loop, if it has one."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    ptx, (found, loop) = kernel.asm["ptx"], instructions(sass)
    if kernel.metadata.name == "prefill_kernel":
        loop = found  # without a loop of its own; sm_100 waits for its product in one
    registers, shared, warps = int(re.search(r"REG:(\d+)", usage)[1]), kernel.metadata.shared, options["num_warps"]
    names = (("tcgen05.mma", "tcgen05"), ("wgmma.mma", "wgmma"), ("mma.sync", "mma"))
    width = next((options[name] for name in ("BC", "BK", "BN") if name in options), None)
    multiplies = any(re.match(MMA, name) for name in found)
    return {
        "registers": registers,
        "spills": sum(name.startswith(("STL", "LDL")) for name in found),
        "shared": shared,
        "ctas_per_sm": ctas_per_sm(capability, registers, shared, warps),
        "matrix": next((name for text, name in names if text in ptx), "fma" if multiplies else "none"),
        "instructions": len(found),
        "per_element": round(len(loop) * 32 * warps / (options["BM"] * width), 1) if width else None,
        "asynchronous_loads": sum(name.startswith(("LDGSTS", "UTMALDG")) for name in found),
        "two_byte_loads": sum(name.startswith("LDG") and name.endswith("U16") for name in found),
        "barriers": sum(name.startswith("BAR") for name in loop),
    }


class PretendedDriver:
    """A device of this capability, on which nothing can be launched."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def capture(capability: int, pairs: tuple[str, ...], ranks: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, statistics) of every kernel that calls with these dtypes and ranks launch on this capability, each once."""
    import triton
    from triton.runtime import driver

    from lora_kernels.backends.triton import tuning

    launched: dict[str, dict[str, Any]] = {}
    run, pair, rank = triton.JITFunction.run, "", 0

    def compile_only(self, *args, grid, warmup, **options):
        if not {"R", "R0"} & set(self.arg_names) and rank != 16:
            return None  # it has no rank: compiled once
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = "x".join(str(options[k]) for k in ("BM", "BK", "BN", "BD", "BC", "BLOCK") if k in options)
        name, form = self.__name__.removesuffix("_kernel"), form_of(dict(zip(self.arg_names, args, strict=False)), options)
        key = f"{name} | {pair} | r{rank} | sm_{capability} | {tile} {form}"
        if key not in launched:
            launched[key] = statistics(kernel, capability, options)
        return None  # no kernel, which would be kept and launched

    driver.set_active(PretendedDriver(capability))
    triton.JITFunction.run = compile_only
    tuning.gpu = lambda device: tuning.Gpu(divmod(capability, 10), 132)
    try:
        for pair in pairs:
            for rank in ranks:
                calls(pair, rank, capability)
    finally:
        triton.JITFunction.run = run
    yield from launched.items()


def form_of(arguments: dict[str, Any], options: dict[str, Any]) -> str:
    """How a kernel is compiled and which of its forms it is: "w8s2 r128 drop"."""
    form = [f"w{options['num_warps']}s{options.get('num_stages', '-')}"]
    form += [f"r{options['maxnreg']}"] if options.get("maxnreg") else []
    form += [k.lower() for k in ("DROP", "FORWARD") if options.get(k)]
    form += [f"x{members}"] if (members := sum(arguments.get(f"A{i}") is not None for i in range(3))) > 1 else []
    form += [options["ACT"]] if options.get("ACT", "silu") != "silu" else []
    form += ["nf4"] if "stride_k" in arguments and arguments["W"] is None else []
    form += ["order"] if arguments.get("order") is not None else []
    if "e" in arguments:
        form += ["ungated"] if arguments["e"] is None else []
        form += ["alone"] if arguments["A"] is None else []
        form += ["halves"] if options["OF"] == 2 else []
    form += ["dc"] if any(arguments.get(name) is not None for name in ("parts_dc", "parts_dc_up", "sums")) else []
    form += [only for missing, only in (("dx", "dA"), ("parts_dA0", "dx")) if arguments.get(missing, 0) is None]
    return " ".join(form + (["few"] if arguments.get("M") == FEW else []))


def _job(job: tuple[int, tuple[str, ...], tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    return dict(capture(*job))


def jobs() -> Iterator[tuple[int, tuple[str, ...], tuple[int, ...]]]:
    """What is compiled. sm_86 and sm_89 run sm_80's instructions with less shared memory, float16 those of bfloat16.

    Ranks that are not powers of two, or less than 16, are those of bfloat16 on sm_80 and sm_90; rank 8, which is the default,
    with float32 adapters too.
    """
    for capability in CAPABILITIES:
        for pair in PAIRS[:1] + PAIRS[4:5] if capability in (86, 89) else PAIRS:
            small = {"bf16 bf16": (4, 8, 12, 24, 32), "bf16 fp32": (8,)}.get(pair, ()) if capability in (80, 90) else ()
            yield capability, (pair,), (16, *small) if pair == "fp16 fp16" else (16, 64, *small)


def compile_jobs(todo: list[tuple[int, tuple[str, ...], tuple[int, ...]]]) -> dict[str, dict[str, Any]]:
    """Their rows, compiled in two fresh processes at a time (fresh: there the kernels are defined for the compiler)."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(min(2, len(todo)), mp_context=context) as pool:
            return {key: row for rows in pool.map(_job, todo) for key, row in sorted(rows.items())}
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


if __name__ == "__main__":
    rows = compile_jobs(list(jobs()))
    TABLE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(row)}" for k, row in rows.items()) + "\n}\n")
    sys.stdout.write(f"{len(rows)} kernels, {sum(row['spills'] > 0 for row in rows.values())} with spills: {TABLE}\n")
