"""Choice of the backend: requests, refusals with a reason, and importing without a GPU, Triton or an extension."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from accuracy import Case

import lora_kernels
from lora_kernels import backend_report, lora_linear, use_backend
from lora_kernels import plan as backends
from lora_kernels.backends.torch import linear as reference


def compute():
    tensors = Case(needs=()).tensors()
    return lora_linear(*(tensors[name] for name in "xWAB"))


@pytest.fixture
def fussy(monkeypatch):
    """A stand-in for the triton backend that computes like the reference, but only with a multiple of 8 features."""
    calls = []

    def forward(*args):
        calls.append(args)
        return reference.lora_forward(*args)

    def why_not(x, weight, lora_A, lora_B):
        return None if x.shape[-1] % 8 == 0 else f"{x.shape[-1]} features are not a multiple of 8"

    backend = SimpleNamespace(lora_forward=forward, lora_backward=reference.lora_backward, why_not=why_not, calls=calls)
    original = backends.load
    monkeypatch.setattr(backends, "load", lambda name: backend if name == "triton" else original(name))
    return backend


def test_auto_takes_the_first_that_can(fussy):
    compute()
    assert len(fussy.calls) == 1
    lora_linear(torch.ones(2, 9), torch.ones(3, 9), torch.ones(1, 9), torch.ones(3, 1))
    assert len(fussy.calls) == 1


def test_a_named_backend_is_used_or_raises(fussy):
    with use_backend("torch"):
        compute()
    assert not fussy.calls
    with use_backend("triton"):
        compute()
        assert len(fussy.calls) == 1
        with pytest.raises(RuntimeError, match=r"'triton' was requested but cannot.*9 features are not a multiple of 8"):
            lora_linear(torch.ones(2, 9), torch.ones(3, 9), torch.ones(1, 9), torch.ones(3, 1))


def test_setting_is_restored_and_seen_by_other_threads():
    assert use_backend.current == "auto"
    with use_backend("torch"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(use_backend.current))
        thread.start()
        thread.join()
        assert seen == ["torch"]
        with use_backend("auto"):
            assert use_backend.current == "auto"
        assert use_backend.current == "torch"
    assert use_backend.current == "auto"
    try:
        use_backend("torch")
        assert use_backend.current == "torch"
    finally:
        use_backend("auto")


def test_unknown_and_missing_backends(monkeypatch):
    with pytest.raises(ValueError, match="backend: got 'tirton', expected 'auto', 'cuda', 'triton', 'torch'"):
        use_backend("tirton")
    monkeypatch.setitem(backends.BACKENDS, "cuda", "lora_kernels.backends.not_there")
    backends.load.cache_clear()
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: this version"):
        use_backend("cuda")
    backends.load.cache_clear()
    assert use_backend.current == "auto"


def test_report(fussy):
    rows = {row.backend: row for row in backend_report(x=torch.ones(2, 9))}
    assert rows["torch"].used
    assert "not a multiple of 8" in rows["triton"].reason
    assert not rows["triton"].usable
    report = backend_report(x=torch.ones(2, 8), weight=torch.ones(3, 8))
    assert [row.backend for row in report if row.used] == ["triton"]
    with use_backend("torch"):
        assert [row.backend for row in backend_report(x=torch.ones(2, 8)) if row.used] == ["torch"]
    assert all(row.backend in str(report) and row.reason in str(report) for row in report)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_import_touches_neither_triton_nor_a_device():
    code = (
        "import sys, torch; before = set(sys.modules); import lora_kernels; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "assert not torch.cuda.is_initialized(); "
        "print(sorted(new & {'triton', 'transformers', 'peft', 'rich', 'typer', 'matplotlib', 'safetensors'}))"
    )
    root = os.path.dirname(os.path.dirname(lora_kernels.__file__))
    result = python(code, PYTHONPATH=root)
    assert result.stdout.strip() == "[]", result.stderr


def test_environment_variable():
    root = os.path.dirname(os.path.dirname(lora_kernels.__file__))
    code = (
        "import torch; from lora_kernels import lora_linear, use_backend; print(use_backend.current); "
        "lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1))"
    )
    result = python(code, PYTHONPATH=root, LORA_KERNELS_BACKEND="torch")
    assert (result.returncode, result.stdout.strip()) == (0, "torch")
    result = python(code, PYTHONPATH=root, LORA_KERNELS_BACKEND="tirton")
    assert "LORA_KERNELS_BACKEND: got 'tirton', expected 'auto'" in result.stderr
