"""Kept kernels get what Triton's own launch would give them, and only arguments for which they were compiled.

In a process of its own, where kernels are defined for the compiler: tiny CPU tensors, a pretended driver, nothing compiled.
"""

import concurrent.futures
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

BF16, FP32 = torch.bfloat16, torch.float32
K, N, R = 64, 80, 8
launched: list[tuple] = []  # (compiled kernel, grid, arguments)
compiled: list[str] = []
by_binder: list[str] = []  # kernels that went through JITFunction.run
device, ready = 0, False


class Compiled:
    """What Triton's own launch uses of a compiled kernel."""

    function, packed_metadata = 7, ("metadata",)

    def __init__(self, name: str):
        self.name = name

    def launch_metadata(self, grid: tuple, stream: int, *args: object) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, function: int, metadata: tuple, about: None, *rest: Any) -> None:
        assert (z, stream, function, metadata, about) == (1, 100 + device, 7, ("metadata",), None)
        enter, _, *arguments = rest
        if enter is not None and getattr(enter, "calls", None):
            enter(about)
        launched.append((self, (x, y), arguments))


def pretend() -> None:
    """In the process of these checks, once."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from lora_kernels.backends.triton import gpu, tuning

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: device)
        get_current_stream = staticmethod(lambda device: 100 + device)

    def compile_nothing(self, key, signature, device, *_: object, **__: object) -> Compiled:
        kernel = self.device_caches[device][0][key] = Compiled(self.__name__)
        compiled.append(self.__name__)
        return kernel

    def compile_source(source, **_: object) -> Compiled:  # what Triton 3.4 calls instead
        compiled.append(source.fn.__name__)
        return Compiled(source.fn.__name__)

    run = triton.JITFunction.run

    def counted(self, *args: object, **options: object) -> object:
        by_binder.append(self.__name__)
        return run(self, *args, **options)

    driver.set_active(Driver())
    triton.JITFunction._do_compile, triton.JITFunction.run = compile_nothing, counted
    triton.compiler.compile = compile_source
    gpu.INTERPRETER = True
    tuning.gpu = lambda device: tuning.Gpu((9, 0), 132)


def in_the_process(check: Callable[[], None]) -> None:
    global ready
    if not ready:
        pretend()
        ready = True
    for log in (launched, compiled, by_binder):
        log.clear()
    from lora_kernels import plan

    plan.changed()
    check()


@pytest.fixture(scope="module")
def pretended() -> Iterator[Callable[[Callable[[], None]], None]]:
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield lambda check: pool.submit(in_the_process, check).result()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def test_arguments(pretended):
    pretended(arguments_of_every_kernel)


def test_other_rows_of_dy(pretended):
    pretended(other_rows_of_dy)


def test_packing(pretended):
    pretended(any_number_of_rows)


def test_threads(pretended):
    pretended(many_threads)


def test_hooks(pretended):
    pretended(hooks_see_every_launch)


def test_devices_and_tiles(pretended):
    pretended(another_device_and_another_tile)


def layer_calls(M: int = 8, p: float = 0.1, adapter: torch.dtype = BF16, s: Any = 2.0, quantize: bool = False) -> None:
    """Forward and backward of a layer."""
    from lora_kernels import lora_linear, quantize_nf4, use_backend

    x, W = torch.randn(M, K, dtype=BF16, requires_grad=True), torch.randn(N, K, dtype=BF16)
    A, B = torch.randn(R, K, dtype=adapter, requires_grad=True), torch.randn(N, R, dtype=adapter, requires_grad=True)
    with use_backend("triton"):
        y = lora_linear(x, quantize_nf4(W) if quantize else W, A, B, scaling=s, dropout_p=p)
    y.backward(torch.randn(M, N, dtype=BF16))


def shapes(log: list[tuple]) -> list[tuple]:
    """What was launched, with tensors by what a kernel sees of them."""
    see = lambda a: (a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a  # noqa: E731
    return [(kernel, grid, [see(argument) for argument in arguments]) for kernel, grid, arguments in log]


def arguments_of_every_kernel() -> None:
    """The second call launches no kernel by Triton's binder, and gives each the arguments and grid of the first."""
    for M in (1, 8, 64, 1000):
        for options in ({}, {"p": 0.0}, {"adapter": FP32}, {"s": torch.tensor(2.0)}, {"quantize": True}):
            launched.clear()
            layer_calls(M, **options)
            first = shapes(launched)
            assert first, "nothing was launched"
            launched.clear()
            by_binder.clear()
            layer_calls(M, **options)
            assert by_binder == []
            assert shapes(launched) == first


def other_rows_of_dy() -> None:
    """A kernel that was compiled for aligned rows is given no others."""
    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy

    h, B = torch.randn(8, R, dtype=BF16), torch.randn(N, R, dtype=BF16)
    wide = torch.randn(8 * 96 + 1, dtype=BF16)
    aligned, further, apart = wide[: 8 * N].view(8, N), wide[1 : 8 * N + 1].view(8, N), wide[: 8 * 96].view(8, 96)[:, :N]
    for dy in (aligned, further, apart, aligned, further, apart):
        grad_dy(dy, h, B, 2.0, True, True, False)
    assert by_binder == ["grad_dy_kernel"] * 4  # one for each kind, and again where dy is not aligned
    kernels = [kernel for kernel, _, _ in launched]
    assert kernels[0] is kernels[2] is not kernels[1]  # rows 80 and 96 apart: both are multiples of 16
    assert kernels[3:] == kernels[:3]
    assert [arguments[0] is dy for (_, _, arguments), dy in zip(launched, [aligned, further, apart], strict=False)] == [
        True
    ] * 3


def any_number_of_rows() -> None:
    """Packing: no kernel is compiled or bound for another number of rows, but a sum of another kind of size."""
    from lora_kernels.backends.triton import launch
    from lora_kernels.backends.triton.kernels.grad_dy import grad_dy
    from lora_kernels.backends.triton.kernels.grad_x import grad_x
    from lora_kernels.backends.triton.kernels.prefill import prefill
    from lora_kernels.backends.triton.kernels.project import project

    A, B, x, dy = (torch.empty(shape, dtype=BF16) for shape in ((R, 4096), (2048, R), (5000, 4096), (5000, 2048)))

    def side_kernels(M: int) -> None:
        (h,) = project(x[:M], (A,), None)
        prefill(h, B, 2.0, None, BF16)
        g, _, _ = grad_dy(dy[:M], h, B, 2.0, True, True, False)
        grad_x(x[:M], (g,), (A,), None, BF16, True, (True,))

    numbers = random.Random(0)
    for M in (1, 16, 33, 64, 1001, 5000):
        side_kernels(M)
    assert set(by_binder) == {"project_kernel", "prefill_kernel", "grad_dy_kernel", "grad_x_kernel", "sum_kernel"}
    by_binder.clear()
    compiled.clear()
    for _ in range(1000):
        side_kernels(numbers.randint(1, 5000))
    assert compiled == []
    assert by_binder == []
    seen: dict[int, list] = {}  # a single part is in the result's dtype, several are in float32
    for kernel, _, arguments in launched:
        dtypes = [argument.dtype if isinstance(argument, torch.Tensor) else None for argument in arguments]
        assert seen.setdefault(id(kernel), dtypes) == dtypes, kernel.name
    limit, launch.LIMIT = launch.LIMIT, 3
    for width in range(64, 640, 16):
        project(x[:8, :width], (A[:, :width].contiguous(),), None)
        assert len(launch._runs) <= 3
    launch.LIMIT = limit


def many_threads() -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            for M in (1, 7, 300, 2000):
                layer_calls(M)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(launched) % 8 == 0


def hooks_see_every_launch() -> None:
    """While a profiler listens, Triton launches itself; afterwards kept kernels are launched again."""
    from triton import knobs

    seen: list[Any] = []
    layer_calls()
    by_binder.clear()
    chain = knobs.runtime.launch_enter_hook
    if chain is not None:  # from Triton 3.5 on
        chain.add(seen.append)
        layer_calls()
        chain.remove(seen.append)
        assert len(by_binder) == len(seen) == 4
        layer_calls()
        assert len(by_binder) == 4
        by_binder.clear()
    for hook, calls in ((None, 0), (seen.append, 4)):  # up to Triton 3.4
        knobs.runtime.launch_enter_hook = hook
        layer_calls()
        assert len(by_binder) == calls
    knobs.runtime.launch_enter_hook = chain


def another_device_and_another_tile() -> None:
    """A kernel is loaded for each device; a tile on trial, and what a backend answers anew, is taken at once."""
    global device
    from lora_kernels.backends.triton import tuning
    from lora_kernels.backends.triton.tuned import Tile

    for device in (0, 1, 0, 1):  # noqa: B007
        layer_calls()
    assert len(by_binder) == 2 * 4
    device = 0
    tuning.trial["project"] = Tile(32, 32, 4, 2)
    try:
        layer_calls()
    finally:
        tuning.trial.clear()
    assert by_binder[8:] == ["project_kernel"]
    assert launched[16][2][-3:] == [16, 16, 16]
