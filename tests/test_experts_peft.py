"""PEFT's target_parameters under accelerate: the numbers of PEFT and of float64, and no stack of W + B·A."""

import copy

import pytest
import torch
from accuracy import violations
from experts_case import IDS, MODELS, in_double, moe, run, stacks, with_peft
from peft_model import FAST
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import accelerate, restore


def close(tested, exact, tolerance=2e-5):
    assert tested.keys() == exact.keys()
    for name, value in exact.items():
        error = (tested[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error <= tolerance, f"{name}: {error:.2g}"


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name):
    model = with_peft(moe(name))
    theirs, exact = run(model), run(in_double(model))
    report = accelerate(model)
    assert len(report.accelerated) == 2 * (1 if name in ("DeepseekV3", "NemotronH") else 2), "wrappers of each layer"
    assert not report.falling_back and not report.skipped and not report.without_lora
    ours = run(model)
    assert report.calls() == {FAST: len(report.accelerated)}
    close(ours, exact)
    close(theirs, exact)
    assert all(ours[path].abs().max() > 1e-6 for path in ours), "a gradient of zeros proves nothing"
    restore(model)
    assert torch.equal(run(model)["logits"], theirs["logits"])
