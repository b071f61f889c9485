"""pytest-benchmark entry points at small shapes: times are recorded for comparison, never asserted.

    PYTHONPATH=. pytest bench/test_regression.py --benchmark-enable --benchmark-autosave      # then, after a change,
    PYTHONPATH=. pytest bench/test_regression.py --benchmark-enable --benchmark-compare

Without --benchmark-enable each entry runs once, which is how CI shows that they run.
"""

import functools

import pytest
import torch

from lora_kernels import accelerate
from lora_kernels.commands.bench import peers
from lora_kernels.commands.bench.blocks import BlockProblem
from lora_kernels.commands.bench.suites import FORWARD, Shape, Workload
from lora_kernels.mask import dropout_mask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"linear": Shape(576, 1536), "qkv": Shape(576, 1536, "qkv", 192), "mlp": Shape(576, 1536, "mlp")}


def synchronized(step):
    """`step`, finished on the device when it returns."""
    if DEVICE.type == "cpu":
        return step

    def run():
        step()
        torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["bare", "ours", "peft"])
def test_training_step(benchmark, name, shape, p):
    if name == "peft":
        pytest.importorskip("peft")
    benchmark.group = f"{shape} p={p}"
    problem = BlockProblem.draw(Workload(256, SHAPES[shape], 8, p, torch.float32), DEVICE, seed=0)
    (variant, *_) = peers.variants(name, problem)
    benchmark(synchronized(problem.step(variant.module)))


@pytest.mark.parametrize("name", ["bare", "ours"])
@pytest.mark.parametrize("M", [1, 8])
def test_forward_of_few_tokens(benchmark, name, M):
    benchmark.group = f"forward M={M}"
    problem = BlockProblem.draw(Workload(M, SHAPES["linear"], 8, 0.0, torch.float32, FORWARD), DEVICE, seed=0)
    (variant,) = peers.variants(name, problem)
    benchmark(synchronized(problem.step(variant.module)))


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["bare", "ours", "accelerated", "peft"])
def test_host_time(benchmark, name, p):
    """What a call costs the host, forward and backward: the products of 8 tokens of 32 features take no time."""
    if name in ("accelerated", "peft"):
        pytest.importorskip("peft")
    benchmark.group = f"host time p={p}"
    problem = BlockProblem.draw(Workload(8, Shape(32, 32), 4, p, torch.float32), DEVICE, seed=0)
    (variant, *_) = peers.variants("peft" if name == "accelerated" else name, problem)
    if name == "accelerated":
        assert accelerate(variant.module).accelerated
    benchmark(synchronized(problem.step(variant.module)))


def test_dropout_mask(benchmark):
    benchmark(synchronized(functools.partial(dropout_mask, 256, 576, 0.1, 1, device=DEVICE)))
