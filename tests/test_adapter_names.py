"""Any string without a dot names an adapter, and other names are refused before anything changes."""

import copy
import keyword
import pickle

import pytest
import torch
from layer_case import layer
from model_case import QV, TOKENS, Model, flags, snapshot, train
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_plus_param_groups,
    lora_state_dict,
    remove_lora,
    save_adapter,
    set_adapter,
)

# attributes of dicts, modules, objects and of this package; parts of state-dict keys; what is no identifier
NAMES = [
    *("keys", "items", "values", "pop", "update", "get", "clear", "training", "forward", "parameters", "_parameters", "T"),
    *("__class__", "__dict__", "__init__", "None", "default", "lora_A", "lora_B", "lora_bias", "weight", "bias", "adapters"),
    *("modules_to_save", "base_layer", "5", "two words", " ", "ключ", "深い", "a/b", "a:b", "-"),
]
every_name = pytest.mark.parametrize("name", NAMES)


@every_name
def test_a_layer(name):
    made = LoRALinear.from_linear(nn.Linear(12, 10), adapter_name=name, r=2, init_lora_weights=False, lora_bias=True)
    same = LoRALinear.from_linear(nn.Linear(12, 10), adapter_name="other", r=2, init_lora_weights=False, lora_bias=True)
    keys = [f"{part}.{name}" for part in ("lora_A", "lora_B", "lora_bias")]
    assert [key for key in made.state_dict() if "lora" in key] == keys
    assert [key for key, _ in made.named_parameters() if "lora" in key] == keys
    same.load_state_dict({key.replace(f".{name}", ".other"): value for key, value in made.state_dict().items()})
    x, used = torch.randn(3, 12), made.training
    expected = same(x)
    assert torch.equal(made(x), expected)
    assert torch.equal(torch.func.functional_call(made, dict(made.named_parameters()), (x,)), expected)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), expected)
        nn.init.zeros_(twin.lora_A[name])
        twin.load_state_dict(made.state_dict(), assign=True)
        assert twin.lora_A[name].data_ptr() == made.lora_A[name].data_ptr()
        assert torch.equal(twin(x), expected)
    made(x).sum().backward()
    assert all(made.get_submodule(key.split(".")[0])[name].grad is not None for key in keys)
    torch.testing.assert_close(copy.deepcopy(made).double()(x.double()).float(), expected)
    made.add_adapter("second", 3, 4)
    made.set_adapter("second")
    made.set_adapter(name)
    assert torch.equal(made(x), expected)
    assert f"{name}: r=2" in repr(made)
    made.delete_adapter(name)
    assert [key for key in made.state_dict() if "lora" in key] == ["lora_A.second", "lora_B.second"]
    assert made.training is used


@every_name
def test_a_module_s_own_methods(name):
    made = LoRALinear.from_linear(nn.Linear(12, 10), adapter_name=name, r=2, init_lora_weights=False, lora_bias=True)
    model = nn.Sequential(made, nn.ReLU())
    for mode in (False, True):
        assert model.train(mode) is model
        assert {module.training for module in model.modules()} == {mode}
    assert not any(module.training for module in model.eval().modules())
    values = [made.lora_A[name].detach(), made.lora_B[name].detach(), made.lora_bias[name].detach()]
    for convert in (lambda: model.to(torch.float64), model.half, lambda: model.to("cpu", torch.bfloat16), model.zero_grad):
        convert()
        assert list(made.lora_A) == list(made.lora_B) == list(made.lora_bias) == [name]
        assert not made.lora_A.training
    for value, kept in zip(values, made.adapter_parameters(), strict=True):
        assert kept.dtype == torch.bfloat16
        torch.testing.assert_close(kept.float(), value, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["keys", "training", "_parameters", "two words", "ключ"])
def test_compiled(name):
    torch.compiler.reset()
    made = LoRALinear.from_linear(nn.Linear(12, 10), adapter_name=name, r=2, init_lora_weights=False)
    x = torch.randn(3, 12)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))
    torch.compile(made, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert made.lora_A[name].grad.abs().sum() > 0


@pytest.mark.parametrize("name", [n for n in NAMES if not keyword.iskeyword(n) and not hasattr(nn.Module(), n)])
def test_exported(name):
    """All but those that README.md excepts."""
    made = LoRALinear.from_linear(nn.Linear(12, 10), adapter_name=name, r=2, init_lora_weights=False)
    x = torch.randn(3, 12)
    torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), made(x))


@every_name
def test_a_model(name, tmp_path):
    model = Model(tie=False)
    add_lora(model, LoRAConfig(r=2, modules_to_save=["norm"], bias="lora_only", lora_bias=True, **QV), name)
    sides = [len(group["params"]) for group in lora_plus_param_groups(model, lr=1.0)]
    assert sides == [4, 8, 6], "A; B and b; norms and biases"
    train(model)
    expected, trained = model(TOKENS), lora_state_dict(model)
    assert f"blocks.0.q_proj.lora_A.{name}" in trained
    assert f"blocks.0.norm.modules_to_save.{name}.weight" in trained
    save_adapter(model, tmp_path, name)
    twin, base = copy.deepcopy(model), Model(tie=False)
    base.load_state_dict({key: value for key, value in model.state_dict().items() if "lora" not in key})
    set_adapter(twin, None)
    set_adapter(twin, name)
    load_lora_state_dict(twin, trained)
    assert torch.equal(twin(TOKENS), expected)
    before = snapshot(base)
    load_adapter(base, tmp_path, name)
    torch.testing.assert_close(base(TOKENS), expected)
    remove_lora(base)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("name", [5, None, True, b"x", ("a",), "", "a.b", ".", ".."], ids=repr)
def test_refused_names(name, tmp_path):
    words = r"expected a string that is not empty and has no dot"
    made = layer()
    with pytest.raises(ValueError, match=f"name: got .*{words}"):
        made.add_adapter(name, 2, 4)
    assert list(made.adapters) == list(made.lora_A) == ["default"]
    linear = nn.Linear(12, 10)
    with pytest.raises(ValueError, match=words):
        LoRALinear.from_linear(linear, adapter_name=name)
    assert linear.weight.requires_grad, "a refused layer is not frozen"
    model = Model()
    before = flags(model)
    for call in (
        lambda: add_lora(model, LoRAConfig(**QV), name),
        lambda: load_adapter(model, tmp_path, name),
    ):
        with pytest.raises(ValueError, match=f"adapter_name: got .*{words}"):
            call()
    assert flags(model) == before
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


@pytest.mark.parametrize("name", ["/", "/elsewhere"])
def test_a_name_that_leads_out_of_the_directory_is_no_folder(name, tmp_path):
    model = Model()
    add_lora(model, LoRAConfig(**QV), name)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match=r"adapter_name: got '/.*which is no folder inside"):
            call(model, tmp_path / "adapters", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a/", "a//b", "default/", "a/ /", "a\0b", "\0"])
def test_a_name_without_a_folder_of_its_own_is_not_saved(name, tmp_path):
    """Path would read it as another name, whose files it would replace."""
    model = Model()
    add_lora(model, LoRAConfig(**QV), name)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match=r"adapter_name: got '.*which is no name of a folder: expected one without null"):
            call(model, tmp_path / "adapters", name)
    assert not list(tmp_path.iterdir())
