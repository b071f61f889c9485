"""What a model of many layers costs: this package's calls, counted, grow with the layers and not with their square."""

import sys

import pytest
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_state_dict,
    remove_lora,
    save_adapter,
    save_merged,
    set_adapter,
)


def model(layers):
    return nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(layers)))


def patterns(layers, escape=""):
    return {f"{i}{escape}.0": 1 + i % 3 for i in range(layers)}


CONFIGS = {
    "names": lambda layers: {"target_modules": ["0"]},
    "paths": lambda layers: {"target_modules": list(patterns(layers))},
    "patterns": lambda layers: {"rank_pattern": patterns(layers), "alpha_pattern": patterns(layers, "\\")},
    "bias": lambda layers: {"bias": "all"},
    "lost names": lambda layers: {"target_modules": [*patterns(layers), *(f"{i}.lost" for i in range(layers))]},
}


def calls(function):
    """How often this package calls, or resumes, a function of its own, or calls one of C's."""
    counted = 0

    def count(frame, event, _):
        nonlocal counted
        counted += event in ("call", "c_call") and frame.f_globals.get("__name__", "").startswith("lora_kernels.")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted


def costs(layers, kind, folder):
    tuned, config, state = model(layers), LoRAConfig(r=2, **CONFIGS[kind](layers)), {}
    steps = {
        "add": lambda: add_lora(tuned, config),
        "save": lambda: save_adapter(tuned, folder),
        "load": lambda: load_adapter(model(layers), folder),
        "load again": lambda: load_adapter(tuned, folder),
        "state dict": lambda: state.update(tuned.state_dict()),
        "load the state dict": lambda: tuned.load_state_dict(state),
        "adapters alone": lambda: load_lora_state_dict(tuned, lora_state_dict(tuned)),
        "export": lambda: save_merged(tuned, folder / "merged"),
        "activate": lambda: set_adapter(tuned, "default"),
        "remove": lambda: remove_lora(tuned),
    }
    return {name: calls(step) for name, step in steps.items()}


@pytest.mark.filterwarnings("ignore:target_modules")
@pytest.mark.parametrize("kind", CONFIGS)
def test_four_times_as_many_layers_cost_four_times_as_much(kind, tmp_path):
    few, many = costs(15, kind, tmp_path), costs(60, kind, tmp_path)
    assert {name: round(many[name] / few[name], 2) for name in few if many[name] > 4.4 * few[name]} == {}
