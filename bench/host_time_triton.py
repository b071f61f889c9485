"""Host time of a layer's call on Triton's path, µs on one core, without a GPU: tiny CPU tensors and a pretended driver.

    PYTHONPATH=. OMP_NUM_THREADS=1 python bench/host_time_triton.py [seconds for each number]

Everything runs but the kernels and Triton's C launcher (2.3 µs a launch, the driver's own 2.5). Each number is the least of
many short windows, so that a busy machine shows in none of them. Rows are what a user waits for; parts, what they are made of.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable

os.environ.pop("TRITON_INTERPRET", None)  # before kernels are defined

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lora_kernels import LoRALinear, quantize_nf4, use_backend
from lora_kernels.backends.triton import gpu, tuning
from lora_kernels.backends.triton.kernels import nf4_dequantize
from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
from lora_kernels.backends.triton.kernels.grad_x import grad_x
from lora_kernels.backends.triton.kernels.prefill import prefill, prefill_kernel
from lora_kernels.backends.triton.kernels.project import project
from lora_kernels.values import Dropout

M, K, N, R = 8, 16, 16, 8
BF16, FP32 = torch.bfloat16, torch.float32
WINDOW = 4  # calls, less than a millisecond: a busy machine leaves some of them alone
launches = 0


class Driver:
    """An H100 on which launches do nothing."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


class Compiled:
    """What JITFunction.run uses of a compiled kernel."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, grid: tuple, stream: int, *args: object) -> None:
        return None

    def run(self, *args: object) -> None:
        global launches
        launches += 1


def pretend() -> None:
    """Triton compiles nothing and launches nothing; CPU tensors are let in as an H100's."""

    def compile_nothing(self, key, signature, device, *_: object, **__: object) -> Compiled:
        self.device_caches[device][0][key] = kernel = Compiled()
        return kernel

    driver.set_active(Driver())
    triton.JITFunction._do_compile = compile_nothing
    gpu.INTERPRETER = True
    tuning.gpu = lambda device: H100
    H100 = tuning.Gpu((9, 0), 132)


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """The least time of a call over windows of a few calls."""
    for _ in range(10 * WINDOW):
        call()
    least, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        for _ in range(WINDOW):
            call()
        least = min(least, time.perf_counter() - start)
    return 1e6 * least / WINDOW


def times(layer: nn.Module, seconds: float) -> tuple[list[float], list[int]]:
    """µs of forward, backward and both, and the launches of forward and backward."""
    x, dy = torch.randn(M, K, dtype=BF16, requires_grad=True), torch.randn(M, N, dtype=BF16)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    before = launches
    y = layer(x)
    middle = launches
    torch.autograd.grad(y, wanted, dy, retain_graph=True)
    calls = (
        lambda: layer(x),
        lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True),
        lambda: torch.autograd.grad(layer(x), wanted, dy),
    )
    counts = [middle - before, launches - middle]
    return [microseconds(call, seconds) for call in calls], counts


def ours(p: float, adapter: torch.dtype, quantize: str | None = None) -> nn.Module:
    base = nn.Linear(K, N, bias=False, dtype=BF16)
    settings = {"r": R, "lora_alpha": 2 * R, "lora_dropout": p, "init_lora_weights": False}
    layer = LoRALinear.from_linear(base, quantize=quantize, **settings)
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter)
    return layer.train()


def peft(p: float, adapter: torch.dtype) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = nn.ModuleDict({"linear": nn.Linear(K, N, bias=False, dtype=BF16)})
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=["linear"], bias="none")
    get_peft_model(model, config, autocast_adapter_dtype=adapter == FP32)
    return model["linear"].train()


class Bare(torch.autograd.Function):
    """A Function of as many tensors that computes nothing: the floor of any layer with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y, h = torch.empty(M, N, dtype=BF16), torch.empty(M, R, dtype=BF16)
        ctx.save_for_backward(x, W, A, B, h)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, _, A, B, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(A), torch.empty_like(B)


class BareLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(N, K, dtype=BF16), requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(R, K, dtype=BF16)), nn.Parameter(torch.randn(N, R, dtype=BF16))

    def forward(self, x: Tensor) -> Tensor:
        return Bare.apply(x, self.W, self.A, self.B)


def parts(seconds: float) -> dict[str, float]:
    """What a call is made of, each alone."""
    x, dy, W = torch.randn(M, K, dtype=BF16), torch.randn(M, N, dtype=BF16), torch.randn(N, K, dtype=BF16)
    A, B, h, y = (torch.randn(shape, dtype=BF16) for shape in ((R, K), (N, R), (M, R), (M, N)))
    drop, W4, out = Dropout(0.1, torch.tensor(1)), quantize_nf4(W), torch.empty(1, N * K, dtype=BF16)
    constants = {"PRECISION": "tf32x3", "BM": 64, "BN": 128, "BR": 16}
    kernel = prefill_kernel[1, 1](h, B, None, y, 2.0, M, N, R, **constants, num_warps=8)
    calls = {
        "a launch by JITFunction.run": lambda: prefill_kernel[1, 1](h, B, None, y, 2.0, M, N, R, **constants, num_warps=8),
        "a launch of its compiled kernel": lambda: kernel.run(
            1, 1, 1, driver.active.get_current_stream(driver.active.get_current_device()), kernel.function,
            kernel.packed_metadata, None, None, None, h, B, None, y, 2.0, M, N, R, "tf32x3", 64, 128, 16,
        ),
        "torch.empty": lambda: torch.empty(M, N, dtype=BF16, device=x.device),
        "y.addmm_(x, W.T)": lambda: y.addmm_(x, W.T),
        "tuning.dataflow": lambda: tuning.dataflow(x, W, "forward"),
        "tuning.splits": lambda: tuning.splits(4096, 256, 1, 132),
        "project": lambda: project(x, (A,), None),
        "project, p = 0.1": lambda: project(x, (A,), drop),
        "prefill": lambda: prefill(h, B, 2.0, None, BF16),
        "grad_dy": lambda: grad_dy(dy, h, B, 2.0, True, True, False),
        "grad_x": lambda: grad_x(x, (h,), (A,), None, BF16, True, (True,)),
        "grad_x, p = 0.1": lambda: grad_x(x, (h,), (A,), drop, BF16, True, (True,)),
        "nf4_dequantize": lambda: nf4_dequantize.dequantize(W4, out),
    }  # fmt: skip
    return {name: microseconds(call, seconds) for name, call in calls.items()}


def main(seconds: float) -> None:
    torch.set_num_threads(1)
    pretend()
    print(f"{'µs on one core, M, K, N, R = ' + str((M, K, N, R)):42}{'forward':>9}{'backward':>9}{'both':>9}  launches")
    rows = {"a Function alone": BareLayer()}
    for p in (0.0, 0.1):
        for adapter, name in ((BF16, "bf16"), (FP32, "fp32")):
            rows[f"ours, {name} adapters, p = {p}"] = ours(p, adapter)
            with contextlib.suppress(ImportError):
                rows[f"PEFT eager, {name} adapters, p = {p}"] = peft(p, adapter)
        rows[f"ours, NF4 and bf16 adapters, p = {p}"] = ours(p, BF16, "nf4")
    with use_backend("triton"):
        for name, layer in rows.items():
            numbers, counts = times(layer, seconds)
            print(f"{name:42}" + "".join(f"{number:9.1f}" for number in numbers) + f"  {counts[0]} + {counts[1]}", flush=True)
        print()
        for name, number in parts(seconds).items():
            print(f"{name:42}{number:9.2f}", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
