from collections.abc import Iterator
from types import ModuleType
from typing import Any

import bitsandbytes_evaluation
import optional_packages
import properties  # noqa: F401  # --hypothesis-profile=thorough
import pytest
import torch
import triton_interpreter
from command_line import run  # noqa: F401
from csrc_emulator import cuda  # noqa: F401
from kinds import Kind

from lora_kernels import cpu_extension, plan, use_backend
from lora_kernels.operation import prepared
from lora_kernels.plan import load

torch.set_num_threads(min(2, torch.get_num_threads()))  # more only fight over a busy machine
if triton_interpreter.DEVICE.type == "cpu":  # Triton's kernels then run in its interpreter, if they are asked for
    triton_interpreter.install()
bitsandbytes_evaluation.install()
LEFT_OUT = optional_packages.left_out()
collect_ignore = [file for files in LEFT_OUT.values() for file in files]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=1, help="so many times as many seeds where files are damaged at random")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seeds(n): the test takes a `seed`, one of n, or of --seeds times as many")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if (marker := metafunc.definition.get_closest_marker("seeds")) is not None:
        metafunc.parametrize("seed", range(marker.args[0] * metafunc.config.getoption("--seeds")))


def pytest_report_header() -> list[str]:
    return [f"left out, {package} is not installed: {', '.join(files)}" for package, files in LEFT_OUT.items()]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """A test that comes to import a package which is not installed is skipped."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in optional_packages.missing():
            pytest.skip(f"{package} is not installed")
        raise


pytest_runtest_setup = pytest_runtest_call  # its fixtures too


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute, truth included: LORA_KERNELS_TEST_DEVICE, by default a GPU where there is one."""
    return triton_interpreter.DEVICE


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    """The backend that computes everything in the test, by name, and the kind of base weight that it computes over."""
    if request.param.backend == "cuda":
        request.getfixturevalue("cuda")
    with use_backend(request.param.backend):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a kind of call does not compute in is no test of it."""
    items[:] = [item for item in items if not _is_refused(getattr(item, "callspec", None))]


def _is_refused(callspec: Any) -> bool:
    kind = None if callspec is None else callspec.params.get("kind")
    if not isinstance(kind, Kind):
        return False
    dtypes = [value for value in callspec.params.values() if isinstance(value, torch.dtype) and value.is_floating_point]
    return any(dtype not in kind.dtypes for dtype in dtypes)


@pytest.fixture(autouse=True)
def _nothing_is_replaced() -> Iterator[None]:
    """Fails the test under which a tile was rejected or a backend given up: what it tested would not be what it names.

    A test that provokes this puts dictionaries of its own in the place of these. What an earlier test made a backend answer,
    by putting something else in the place of a part of it, is forgotten.
    """
    prepared._kinds.clear()
    plan.changed()
    yield
    triton = load("triton", "linear")
    if isinstance(triton, ModuleType):
        replaced = dict(triton.gpu.compilation.rejected), dict(triton.gpu.compilation.broken)
        for found in (triton.gpu.compilation.rejected, triton.gpu.compilation.broken):
            found.clear()
        assert replaced == ({}, {}), "kernels did not compile, and others took their place"


@pytest.fixture(params=["extension", "operations"])
def cpu_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calling test with csrc/cpu's loops, and with PyTorch's operations in their place."""
    if request.param == "operations":
        monkeypatch.setattr(cpu_extension, "extension", None)
    elif cpu_extension.extension is None:
        pytest.skip(cpu_extension.why_not)


@pytest.fixture
def cpu_by_name() -> Iterator[None]:
    """The backend "cpu" alone computes in the test, which is left out where csrc/cpu is not built."""
    if cpu_extension.extension is None:
        pytest.skip(cpu_extension.why_not)
    with use_backend("cpu"):
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
