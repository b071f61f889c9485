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

TABLE = Path(__file__).parents[1] / "lora_kernels/backends/triton/kernels.json"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB for one program, CUDA C++ Programming Guide
PAIRS = ("bf16 bf16", "fp16 fp16", "fp32 fp32", "fp32 fp32 tf32", "bf16 fp32", "fp16 fp32")
MMA = r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA2?)\b"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)")


def main_loop(sass: str) -> int | None:
    """Instructions in the smallest loop that multiplies; None without one."""
    at, labels, multiplies, loops = 0, {}, [], []
    for line in sass.splitlines():
        if match := re.match(r"^(\.L_\w+):", line):
            labels[match[1]] = at
        elif match := INSTRUCTION.match(line):
            at += 1
            if re.match(MMA, match[1]):
                multiplies.append(at)
            target = re.search(r"`\((\.L_\w+)\)", match[2])
            if match[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], at))
    sizes = [end - start for start, end in loops if any(start < m <= end for m in multiplies)]
    return min(sizes, default=None)


def statistics(kernel: Any, options: dict[str, Any]) -> dict[str, Any]:
    """What one compiled kernel needs, from its machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    ptx, loop = kernel.asm["ptx"], main_loop(sass)
    names = (("tcgen05.mma", "tcgen05"), ("wgmma.mma", "wgmma"), ("mma.sync", "mma"))
    width = options.get("BC") or options.get("BK") or options.get("BN")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": kernel.metadata.shared,
        "matrix": next((name for text, name in names if text in ptx), "fma" if re.search(MMA, sass) else "none"),
        "instructions": sum(bool(INSTRUCTION.match(line)) for line in sass.splitlines()),
        "per_element": round(loop * 32 * options["num_warps"] / (options["BM"] * width), 1) if loop and width else None,
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

    def compile_only(self, *args, grid, warmup, **options) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        tile = "x".join(str(options[k]) for k in ("BM", "BK", "BN", "BD", "BC", "BLOCK") if k in options)
        form = [f"w{options['num_warps']}s{options.get('num_stages', '-')}"]
        form += [k.lower() for k in ("DROP", "FORWARD") if options.get(k)]
        name = self.__name__.removesuffix("_kernel")
        key = f"{name} | {pair} | r{rank} | sm_{capability} | {tile} {' '.join(form)}"
        if key not in launched:
            launched[key] = statistics(kernel, options)
        # and returns none, which would be kept and launched

    driver.set_active(PretendedDriver(capability))
    triton.JITFunction.run = compile_only
    tuning.gpu = lambda device: tuning.Gpu(divmod(capability, 10), 132)
    for pair in pairs:
        for rank in ranks:
            tuning_calls(pair, rank)
    yield from launched.items()


def tuning_calls(pair: str, R: int) -> None:
    """Every kernel with its tile for this pair of dtypes, with dropout; at rank 16 without it, at rank 64 with safe tiles."""
    import torch

    from lora_kernels import plan
    from lora_kernels.backends.triton import tuning
    from lora_kernels.backends.triton.kernels import lowrank_product, mask, nf4_dequantize, nf4_product
    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.backends.triton.kernels.prefill import prefill
    from lora_kernels.backends.triton.kernels.project import project
    from lora_kernels.nf4 import NF4Weight
    from lora_kernels.values import Dropout

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype, adapter = (types[name] for name in pair.split()[:2])
    torch.backends.cuda.matmul.fp32_precision = "tf32" if pair.endswith("tf32") else "ieee"
    M, K, N, seed = 1024, 2048, 2048, torch.tensor(1)
    x, dy, W, c = (torch.empty(shape, dtype=dtype) for shape in ((M, K), (M, N), (N, K), (N,)))
    A, B, h = (torch.empty(shape, dtype=adapter) for shape in ((R, K), (N, R), (M, R)))
    nested = (W.new_empty(N * K // 64 // 256, dtype=torch.float32), torch.empty(256), torch.empty(()))
    codes, absmax = (torch.empty(size, dtype=torch.uint8) for size in (N * K // 2, N * K // 64))
    W4 = NF4Weight(codes, absmax, *nested, W.shape, dtype)
    tiles = tuning.tiles
    for best in (True, False) if R == 64 else (True,):
        plan.changed()  # so that tiles are chosen anew
        tuning.tiles = lambda *call, best=best: tiles(*call)[:1] if best else tiles(*call)[1:]
        for dropout in (Dropout(0.1, seed), None) if R == 16 and best else (Dropout(0.1, seed),):
            project(x, A, dropout)
            grad_x(x, h, A, dropout, dtype, need_x=True, need_A=True)
            if dtype != torch.float32:
                lowrank_product.backward(dy, W, h, A, dropout)
        prefill(h, B, 2.0, c, dtype)
        grad_dy(dy, h, B, 2.0, need_g=True, need_B=True, need_c=best)
        if dtype != torch.float32:
            lowrank_product.forward(x, W, h, B, 2.0, c)
            nf4_product.product(x, W4, h, B, 2.0, c)
    nf4_dequantize.dequantize(W4, torch.empty(1, N * K, dtype=dtype))
    mask.drop(x, 0.1, seed, out=torch.empty(M, K, dtype=adapter))
    tuning.tiles = tiles


def _job(job: tuple[int, tuple[str, ...], tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    return dict(capture(*job))


def jobs() -> Iterator[tuple[int, tuple[str, ...], tuple[int, ...]]]:
    """What is compiled. sm_86 and sm_89 run sm_80's instructions with less shared memory, float16 those of bfloat16."""
    for capability in CAPABILITIES:
        for pair in PAIRS[:1] + PAIRS[4:5] if capability in (86, 89) else PAIRS:
            yield capability, (pair,), (16,) if pair == "fp16 fp16" else (16, 64)


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
