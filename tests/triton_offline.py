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
WARP_LIMIT = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # of one processor
PAIRS = ("bf16 bf16", "fp16 fp16", "fp32 fp32", "fp32 fp32 tf32", "bf16 fp32", "fp16 fp32")
SAFE_PAIRS = ("bf16 bf16", "fp16 fp32", "fp32 fp32")  # one of each class of dtypes: the one that needs most
D, FEW = 4096, 64  # features, few tokens
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
    form += ["ungated"] if "e" in arguments and arguments["e"] is None else []
    form += ["dc"] if any(arguments.get(name) is not None for name in ("parts_dc", "parts_dc_up")) else []
    form += [only for missing, only in (("dx", "dA"), ("parts_dA0", "dx")) if arguments.get(missing, 0) is None]
    return " ".join(form + (["few"] if arguments.get("M") == FEW else []))


def calls(pair: str, R: int, capability: int) -> None:
    """The calls of a layer with this pair of dtypes, with dropout: its best tiles, and at rank 64 those that replace them.

    At rank 16 without dropout too and what has no rank, at 16 and 64 the products of two segments; at other ranks the four
    side kernels. On sm_80 and sm_90 in bfloat16 also the forms that few calls take: a trained bias, only dA or only dx, few
    tokens. Tiles that replace others are compiled once for each class of dtypes.
    """
    from lora_kernels import plan
    from lora_kernels.backends.triton import tuning

    tiles = tuning.tiles
    for best in (True, False) if R == 64 and (pair in SAFE_PAIRS or capability in (86, 89)) else (True,):
        tuning.tiles = lambda *call, best=best: tiles(*call)[:1] if best else tiles(*call)[1:]
        plan.changed()  # so that tiles are chosen anew
        side_kernels(pair, R, M=8192, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
        if R in (16, 64):
            group_kernels(pair, R, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
            mlp_kernels(pair, R, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
        if R in (16, 64) and not pair.startswith("fp32"):
            products(pair, R, dropouts=(0.1, 0.0) if R == 16 else (0.1,))
    tuning.tiles = tiles
    plan.changed()
    if R == 16:
        without_a_rank(pair)
    if R == 16 and pair == "bf16 bf16" and capability in (80, 90):
        side_kernels(pair, R, M=FEW, dropouts=(0.1,))
        rare_forms(pair, R)
        for activation in ("gelu", "gelu_tanh", "relu2"):
            mlp_kernels(pair, R, dropouts=(0.1,), activation=activation, gated=activation == "gelu_tanh")


def tensors(pair: str, R: int, M: int) -> dict[str, Any]:
    """x, dy, W, A, B, h and c of a layer 4096→4096, never touched."""
    import torch

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype, adapter = (types[name] for name in pair.split()[:2])
    torch.backends.cuda.matmul.fp32_precision = "tf32" if pair.endswith("tf32") else "ieee"
    shapes = {"x": (M, D), "dy": (M, D), "W": (D, D), "c": (D,)}
    found = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    return found | {name: torch.empty(shape, dtype=adapter) for name, shape in {"A": (R, D), "B": (D, R), "h": (M, R)}.items()}


def side_kernels(pair: str, R: int, M: int, dropouts: tuple[float, ...]) -> None:
    import torch

    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.backends.triton.kernels.prefill import prefill
    from lora_kernels.backends.triton.kernels.project import project
    from lora_kernels.values import Dropout

    t = tensors(pair, R, M)
    for p in dropouts:
        dropout = Dropout(p, torch.tensor(1)) if p else None
        project(t["x"], (t["A"],), dropout)
        grad_x(t["x"], (t["h"],), (t["A"],), dropout, t["x"].dtype, need_x=True, need_As=(True,))
    prefill(t["h"], t["B"], 2.0, t["c"], t["x"].dtype)
    grad_dy(t["dy"], t["h"], t["B"], 2.0, need_g=True, need_B=True, need_c=False)


def group_kernels(pair: str, R: int, dropouts: tuple[float, ...]) -> None:
    """Two and three members over one x."""
    import torch

    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.backends.triton.kernels.project import project
    from lora_kernels.values import Dropout

    t = tensors(pair, R, 8192)
    for n in (2, 3):
        for p in dropouts:
            dropout = Dropout(p, torch.tensor(1)) if p else None
            project(t["x"], (t["A"],) * n, dropout)
            grad_x(t["x"], (t["h"],) * n, (t["A"],) * n, dropout, t["x"].dtype, need_x=True, need_As=(True,) * n)


def mlp_kernels(pair: str, R: int, dropouts: tuple[float, ...], activation: str = "silu", gated: bool = True) -> None:
    """Both passes of an MLP over e and u of [M, D]; without a gate with biases that are trained, as such models have them."""
    import torch

    from lora_kernels.backends.triton.kernels.glu import glu
    from lora_kernels.backends.triton.kernels.glu_backward import NOTHING, Down, Entry, glu_backward
    from lora_kernels.values import Dropout

    t = tensors(pair, R, 8192)
    for p in dropouts:
        dropout = Dropout(p, torch.tensor(1)) if p else None
        e, up = t["x"] if gated else None, Entry(True, t["h"], t["B"], 2.0, True, True, not gated)
        glu(e, t["dy"], t["A"], dropout, activation)
        down = Down(t["h"], t["A"], dropout, True)
        glu_backward(t["dy"], e, t["dy"], down, up if gated else NOTHING, up, activation)


def rare_forms(pair: str, R: int) -> None:
    import torch

    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.values import Dropout

    t, dropout = tensors(pair, R, 8192), Dropout(0.1, torch.tensor(1))
    grad_dy(t["dy"], t["h"], t["B"], 2.0, need_g=True, need_B=True, need_c=True)
    for need_x in (True, False):
        grad_x(t["x"], (t["h"],), (t["A"],), dropout, t["x"].dtype, need_x=need_x, need_As=(not need_x,))


def products(pair: str, R: int, dropouts: tuple[float, ...]) -> None:
    """The products with their low-rank term in one kernel."""
    import torch

    from lora_kernels.backends.triton.kernels import lowrank_product, nf4_product
    from lora_kernels.values import Dropout

    t = tensors(pair, R, 8192)
    for p in dropouts:
        lowrank_product.backward(t["dy"], t["W"], t["h"], t["A"], Dropout(p, torch.tensor(1)) if p else None)
    lowrank_product.forward(t["x"], t["W"], t["h"], t["B"], 2.0, t["c"])
    nf4_product.product(t["x"], weight_of_4_bits(t["W"]), t["h"], t["B"], 2.0, t["c"])


def without_a_rank(pair: str) -> None:
    import torch

    from lora_kernels.backends.triton.kernels import mask, nf4_dequantize

    t = tensors(pair, 16, 8192)
    nf4_dequantize.dequantize(weight_of_4_bits(t["W"]), torch.empty_like(t["W"]))
    mask.drop(t["x"], 0.1, torch.tensor(1), out=torch.empty(t["x"].shape, dtype=t["A"].dtype))


def weight_of_4_bits(W: Any) -> Any:
    import torch

    from lora_kernels.nf4 import NF4Weight

    nested = (torch.empty(D * D // 64 // 256), torch.empty(256), torch.empty(()))
    codes, absmax = (torch.empty(size, dtype=torch.uint8) for size in (D * D // 2, D * D // 64))
    return NF4Weight(codes, absmax, *nested, W.shape, W.dtype)


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
