"""add_weighted_adapter: PEFT's numbers, what it takes over, what it refuses."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from model_case import QV, TOKENS, Model, fail_at, flags, snapshot
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    add_weighted_adapter,
    delete_adapter,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)

CONFIGS = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "out"]},
    "wide": {"r": 6, "lora_alpha": 3, "target_modules": ["v_proj", "out"]},
}


def tuned(configs=CONFIGS, **options):
    model = Model(tie=False)
    for name, config in configs.items():
        add_lora(model, LoRAConfig(**{**config, **options}), name)
        set_adapter(model, name)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.normal_()
    return model


def layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def delta(layer, name):
    return layer.adapters[name].scaling * layer.lora_B[name] @ layer.lora_A[name]


@pytest.mark.parametrize(
    ("adapters", "weights", "combination_type"),
    [
        *((["a", "b"], weights, how) for weights in ([0.7, 0.3], [1, -0.5], [0, 1.0]) for how in ("linear", "cat")),
        *((["b"], [-2.0], how) for how in ("linear", "cat")),
        (["a", "wide"], [0.5, 2.0], "cat"),
    ],
)
def test_the_numbers_are_peft_s(adapters, weights, combination_type, tmp_path):
    peft = pytest.importorskip("peft")
    model = tuned()
    for name in CONFIGS:
        save_adapter(model, tmp_path, name)
    theirs = peft.PeftModel.from_pretrained(Model(tie=False), tmp_path / "a", adapter_name="a")
    for name in ("b", "wide"):
        theirs.load_adapter(tmp_path / name, name)
    theirs.add_weighted_adapter(adapters, weights, "mix", combination_type=combination_type)
    add_weighted_adapter(model, adapters, weights, "mix", combination_type)
    found = [path for path, layer in layers(model).items() if "mix" in layer.adapters]
    assert found
    for path in found:
        own, layer = model.get_submodule(path), theirs.get_submodule(f"base_model.model.{path}")
        torch.testing.assert_close(delta(own, "mix"), layer.get_delta_weight("mix"))
        if combination_type == "linear":
            torch.testing.assert_close(own.lora_A["mix"], layer.lora_A["mix"].weight)
            torch.testing.assert_close(own.lora_B["mix"], layer.lora_B["mix"].weight)
    assert {f"base_model.model.{path}" for path in found} == {
        path for path, layer in theirs.named_modules() if "mix" in getattr(layer, "lora_A", ())
    }


@pytest.mark.parametrize("use_rslora", [False, True])
def test_cat_is_the_weighted_sum(use_rslora):
    """With rsLoRA too, whose scaling PEFT 0.21 applies to the combination once more."""
    model = tuned(use_rslora=use_rslora, lora_bias=True)
    add_weighted_adapter(model, ["a", "b", "wide"], [0.5, -1.0, 2.0], "mix", "cat")
    for layer in layers(model).values():
        parts = [(n, w) for n, w in zip(["a", "b", "wide"], [0.5, -1.0, 2.0], strict=True) if n in layer.adapters]
        torch.testing.assert_close(delta(layer, "mix"), sum(w * delta(layer, n) for n, w in parts))
        biases = [w * layer.adapters[n].scaling * layer.lora_bias[n] for n, w in parts]
        torch.testing.assert_close(layer.adapters["mix"].scaling * layer.lora_bias["mix"], sum(biases))
        assert layer.adapters["mix"].r == sum(layer.adapters[n].r for n, _ in parts)


@pytest.mark.parametrize("combination_type", ["linear", "cat"])
def test_it_waits_is_trained_saved_and_loaded(combination_type, tmp_path):
    model = tuned({"a": CONFIGS["a"], "b": CONFIGS["b"]})
    before, active = snapshot(model), model(TOKENS)
    add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "mix", combination_type)
    assert torch.equal(model(TOKENS), active)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    set_adapter(model, "mix")
    assert {id(p) for p in lora_parameters(model)} == {
        id(p) for name, p in model.named_parameters() if name.endswith(".mix") and p.requires_grad
    }
    assert len(lora_parameters(model)) == 12
    save_adapter(model, tmp_path, "mix")
    other = Model(tie=False)
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "lora" not in key})
    load_adapter(other, tmp_path, "mix")
    torch.testing.assert_close(other(TOKENS), model(TOKENS))


def test_what_one_of_them_trains_is_taken_over(tmp_path):
    configs = {"a": {**CONFIGS["a"], "bias": "lora_only", "modules_to_save": ["norm"]}, "b": CONFIGS["b"]}
    model = tuned(configs)
    set_adapter(model, "a")
    norm, bias = model.blocks[0].norm.weight.clone(), model.blocks[0].q_proj.bias.clone()
    add_lora(model, LoRAConfig(**CONFIGS["wide"]), "bias")
    add_weighted_adapter(model, ["b", "a"], [1.0, 1.0], "mix", "cat")
    set_adapter(model, "mix")
    assert torch.equal(model.blocks[0].norm.weight, norm)
    assert torch.equal(model.blocks[0].q_proj.bias, bias)
    nn.init.zeros_(model.blocks[0].norm.weight)
    set_adapter(model, "a")
    assert torch.equal(model.blocks[0].norm.weight, norm), "in a copy"
    set_adapter(model, "mix")
    save_adapter(model, tmp_path, "mix")
    other = Model(tie=False)
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "lora" not in key})
    load_adapter(other, tmp_path, "mix")
    torch.testing.assert_close(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    model = Model(tie=False).to(dtype)
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(init_lora_weights=False, **CONFIGS[name]), name, autocast_adapter_dtype=False)
    add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "mix")
    assert {p.dtype for name, p in model.named_parameters() if name.endswith(".mix")} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((["a", "x"], [1, 1], "mix"), KeyError, "adapter 'x': not found; adapters here"),
        (([], [], "mix"), ValueError, r"adapters: got \[\], expected a list of different names"),
        (("a", [1], "mix"), ValueError, "adapters: got 'a', expected a list"),
        ((["a", "a"], [1, 1], "mix"), ValueError, "expected a list of different names"),
        ((["a", "b"], [1], "mix"), ValueError, r"weights: got \[1\], expected a finite number for each of \['a', 'b'\]"),
        ((["a", "b"], [1, math.nan], "mix"), ValueError, "weights: got"),
        ((["a", "b"], [1, "2"], "mix"), ValueError, "weights: got"),
        *(
            ((["a", "b"], weights, "mix"), ValueError, "weights: got .*, expected a finite number for each of")
            for weights in (None, 1.0, [1, True], [1, 10**400], [1, 1j], [1, torch.ones(1)], torch.tensor(1.0), [1, 1, 1])
        ),
        *(
            ((adapters, [1, 1], "mix"), ValueError, "adapters: got .*, expected a list of different names")
            for adapters in ([["a"]], [["a"], ["b"]], None, 5, ["a", 5])
        ),
        ((["a", "b"], [1, 1], "a"), ValueError, "adapter_name: got 'a', which is in use"),
        ((["a", "b"], [1, 1], "a.b"), ValueError, "adapter_name: got 'a.b', expected a string"),
        ((["a", "b"], [1, 1], "mix", "svd"), ValueError, "combination_type: got 'svd', expected one of"),
        ((["a", "wide"], [1, 1], "mix"), ValueError, r'v_proj their ranks are .*expected one for "linear"; use "cat"'),
    ],
)
def test_refusals_change_nothing(arguments, error, words):
    model = tuned()
    before, trainable = snapshot(model), flags(model)
    with pytest.raises(error, match=words):
        add_weighted_adapter(model, *arguments)
    assert snapshot(model).keys() == before.keys()
    assert flags(model) == trainable
    assert list(model._lora_state.configs) == list(CONFIGS)


@pytest.mark.parametrize("kind", [np.float32, np.int64, torch.tensor, Fraction], ids=lambda kind: kind.__name__)
def test_numbers_of_other_kinds_are_weights(kind):
    model = tuned()
    add_weighted_adapter(model, ["a", "b"], [kind(2), kind(-1)], "mix", "cat")
    add_weighted_adapter(model, ["a", "b"], [2, -1], "expected", "cat")
    for layer in layers(model).values():
        assert torch.equal(delta(layer, "mix"), delta(layer, "expected"))


def test_a_layer_s_own_adapter_of_the_new_name_is_refused_and_stays():
    model = tuned()
    layer = model.blocks[1].v_proj
    layer.add_adapter("mix", 2, 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapter_name: got 'mix', which is in use; adapters here: .*'mix'"):
        add_weighted_adapter(model, ["a"], [1], "mix")
    assert snapshot(model).keys() == before.keys()
    assert "mix" in layer.adapters


@pytest.mark.parametrize("combination_type", ["cat", "linear"])
def test_a_path_that_another_one_ends_in_keeps_its_rank(combination_type, tmp_path):
    """In the saved file, for PEFT too: "0" alone would also mean "1.0"."""
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))

    model, x = make(), torch.randn(3, 8)
    add_lora(model, LoRAConfig(r=2, target_modules=["0"], exclude_modules=["1.0"], init_lora_weights=False))
    add_lora(model, LoRAConfig(r=3, target_modules=["1.0"], init_lora_weights=False), "b")
    if combination_type == "cat":
        add_lora(model, LoRAConfig(r=4, target_modules=["2", "1.0"], init_lora_weights=False), "c")
    add_weighted_adapter(model, list(model._lora_state.configs), [0.5] * len(model._lora_state.configs), "w", combination_type)
    set_adapter(model, "w")
    folder, other = save_adapter(model, tmp_path, "w"), make()
    load_adapter(other, tmp_path, "w")
    torch.testing.assert_close(other(x), model(x))
    torch.testing.assert_close(peft.PeftModel.from_pretrained(make(), folder)(x), model(x))


def test_modules_that_several_train_are_refused():
    model = tuned({name: {**CONFIGS[name], "modules_to_save": ["norm"]} for name in ("a", "b")})
    with pytest.raises(ValueError, match=r"\['a', 'b'\] all train blocks.0.norm, and there is no weighted combination"):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "mix")


def test_a_failure_halfway_changes_nothing(monkeypatch):
    model = tuned()
    keys = snapshot(model).keys()
    fail_at(monkeypatch, 3)
    with pytest.raises(MemoryError):
        add_weighted_adapter(model, ["a", "b"], [1, 1], "mix")
    assert snapshot(model).keys() == keys


# ---- delete_adapter ----


def test_deleting_adapters_one_after_the_other():
    model = tuned({"a": {**CONFIGS["a"], "bias": "lora_only", "modules_to_save": ["norm"]}, "b": CONFIGS["b"]})
    set_adapter(model, None)
    base = model(TOKENS)
    set_adapter(model, "b")
    second = model(TOKENS)
    delete_adapter(model, "a")
    assert torch.equal(model(TOKENS), second), "the active one stays"
    assert not [name for name in model.state_dict() if name.endswith(".a")]
    assert not model._lora_state.exchanges
    add_lora(model, LoRAConfig(**CONFIGS["wide"]), "a")  # its name is free
    delete_adapter(model, "a")
    delete_adapter(model, "b")
    assert torch.equal(model(TOKENS), base)
    for name in ("a", "b", "x"):
        with pytest.raises(KeyError, match=f"adapter '{name}': not found; adapters here: "):
            delete_adapter(model, name)


@pytest.mark.parametrize("init_lora_weights", [True, "pissa"])
def test_after_the_last_one_a_new_one_is_the_first(init_lora_weights):
    model = Model()
    base, trainable = snapshot(model), flags(model)
    config = {"r": 2, "bias": "all", "modules_to_save": ["lm_head"], "init_lora_weights": init_lora_weights, **QV}
    add_lora(model, LoRAConfig(**config))
    merge_lora(model.eval())
    with pytest.raises(RuntimeError, match="cannot delete an adapter: the model is merged"):
        delete_adapter(model, "default")
    unmerge_lora(model)
    delete_adapter(model, "default")
    assert not any(p.requires_grad for p in model.parameters())
    add_lora(model, LoRAConfig(**config), "new")
    assert lora_parameters(model)
    assert model.blocks[0].q_proj.active_adapter == "new"
    remove_lora(model)
    assert flags(model) == trainable
    for name, value in base.items():
        torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize(
    "wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel], ids=["compile", "parallel"]
)
def test_a_wrapped_model(wrap):
    plain = tuned()
    wrapped = wrap(tuned())
    wrapped.load_state_dict(dict(zip(wrapped.state_dict(), plain.state_dict().values(), strict=True)))
    for model in (plain, wrapped):
        add_weighted_adapter(model, ["a", "wide"], [0.5, 0.5], "mix", "cat")
        delete_adapter(model, "a")
        set_adapter(model, "mix")
    assert torch.equal(wrapped(TOKENS), plain(TOKENS))
    assert [name.split(".", 1)[1] for name in wrapped.state_dict()] == list(plain.state_dict())
