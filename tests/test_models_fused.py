"""Weights that no linear layer has, fused experts and nn.MultiheadAttention's: named with the reason, and left alone."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_kernels import LoRAConfig, accelerate, add_lora, remove_lora

SIZE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8},
}


def moe(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZE, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def experts(model):
    """Paths of the modules with three-dimensional parameters, and the names of these."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            found.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    return found


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_experts_are_named(name, quantize):
    model = moe(name)
    expected = experts(model)
    assert len(expected) >= 2
    report = add_lora(model, LoRAConfig(), quantize=quantize)
    for path, names in expected.items():
        assert all(f"{n}[4, " in report.skipped[path] for n in names)
        assert "as fused experts are, no linear layers" in report.skipped[path]
    assert set(report.skipped) == {*expected, "lm_head"}
    assert str(report).count("not adapted: ") <= 5, "a line for each reason, not for each of the layers"
    assert " and 1 more: " in str(report)


@pytest.mark.parametrize("targets", [["q_proj", "experts"], ["q_proj", "down_proj"], r".*(q_proj|experts\.gate_up_proj)"])
def test_fused_experts_that_target_modules_names(targets):
    report = add_lora(moe("Mixtral"), LoRAConfig(target_modules=targets))
    assert set(report.skipped) == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert len(report.adapted) == 2
    assert not add_lora(moe("Mixtral"), LoRAConfig(target_modules=["q_proj"])).skipped


@pytest.mark.parametrize("name", ["w1", "gate_proj"])
def test_a_name_that_experts_had_before_they_were_fused(name):
    words = r"matches no linear layer of .*; parameters that are no linear layers: \['down_proj', 'gate_up_proj'\]"
    with pytest.warns(UserWarning, match=f"target_modules: '{name}' {words}"):
        add_lora(moe("Mixtral"), LoRAConfig(target_modules=["q_proj", name]))


def test_nothing_but_fused_experts_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"matches no linear layer.*down_proj\[4, 32, 48\] of MixtralExperts"):
        add_lora(moe("Mixtral"), LoRAConfig(target_modules=["down_proj"]))


def test_embeddings_and_convolutions_are_no_experts():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 3), nn.Bilinear(2, 3, 4)])
    model.position = nn.Parameter(torch.zeros(1, 9, 4))
    assert not add_lora(model, LoRAConfig()).skipped


def listed(kind):
    """A module over each kind of parameter that has three dimensions and is no experts'."""
    weights = {"w": nn.Parameter(torch.zeros(4, 3, 2))}
    return {
        "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2),
        "list": lambda: nn.ParameterList(weights.values()),
        "dictionary": lambda: nn.ParameterDict(weights),
        "lazy": lambda: nn.LazyConv1d(4, 3),
    }[kind]()


@pytest.mark.parametrize("kind", ["weight norm", "list", "dictionary", "lazy"])
def test_other_parameters_of_three_dimensions_are_no_experts(kind):
    def model():
        return nn.ModuleDict({"other": listed(kind), "l": nn.Linear(4, 4)})

    for targets in ("all-linear", ["l"]):
        target = model()
        before = [parameter.requires_grad for parameter in target.parameters()]
        report = add_lora(target, LoRAConfig(target_modules=targets))
        assert list(report.adapted) == ["l"]
        assert not report.skipped
        remove_lora(target)
        assert [parameter.requires_grad for parameter in target.parameters()] == before
    report = accelerate(get_peft_model(model(), LoraConfig(target_modules=["l"])))
    assert len(report.accelerated) == 1
    assert not report.without_lora


def test_a_lazy_layer_waits_for_its_first_call():
    model = nn.ModuleDict({"lazy": nn.LazyLinear(4), "l": nn.Linear(4, 4)})
    for options, field in (
        ({"bias": "all"}, "bias: got lazy.bias"),
        ({"modules_to_save": ["lazy"]}, "modules_to_save: got lazy"),
    ):
        with pytest.raises(ValueError, match=f"{field}, .*which has no shape yet.*call the model once before add_lora"):
            add_lora(model, LoRAConfig(target_modules=["l"], **options))
    report = add_lora(model, LoRAConfig())
    assert report.skipped == {"lazy": "a LazyLinear, which has no shape yet: call the model once before add_lora"}
    remove_lora(model)
    assert model["lazy"].weight.requires_grad
    model["lazy"](torch.zeros(1, 3))
    assert set(add_lora(model, LoRAConfig()).adapted) == {"lazy", "l"}


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}])
@pytest.mark.parametrize("plain", [False, True])
def test_attention_is_named(options, plain):
    """A plain nn.Linear in out_proj's place is read in the same way: an adapter on it would say nothing."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **options), "fc": nn.Linear(8, 8)})
    if plain:
        model["attention"].out_proj = nn.Linear(8, 8)
    packed = "q_proj_weight" if options else "in_proj_weight"
    for targets in ("all-linear", ["attention", "out_proj", "fc"], [packed, "out_proj", "fc"]):
        report = add_lora(model, LoRAConfig(target_modules=targets), str(targets).replace(".", ""))
        assert list(report.adapted) == ["fc"]
        assert set(report.skipped) == {"attention", "attention.out_proj"}
        names = ("q_proj_weight[8, 8]", "k_proj_weight[8, 3]", "v_proj_weight[8, 5]") if options else ("in_proj_weight[24, 8]",)
        assert all(name in report.skipped["attention"] for name in names)
        assert "reads its weight and does not call it" in report.skipped["attention.out_proj"]


@pytest.mark.parametrize("target_parameters", [None, ["experts.gate_up_proj", "experts.down_proj"]])
def test_acceleration_names_fused_experts(target_parameters):
    model = moe("Mixtral")
    paths = [f"base_model.model.{path}" for path in experts(model)]
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], target_parameters=target_parameters))
    report = accelerate(model)
    if target_parameters is None:
        assert len(report.accelerated) == 2
        assert list(report.without_lora) == paths
        assert "without LoRA: base_model.model.model.layers.0.mlp.experts and 1 more: gate_up_proj[4, 96, 32]" in str(report)
        assert not report.skipped
    else:
        assert not report.without_lora
        assert not report.skipped
        assert {*paths, *(f"{path}.base_layer" for path in paths)} < set(report.accelerated)


@pytest.mark.parametrize(("target", "inner"), [("0", ".base_layer.out_proj"), ("out_proj", ".out_proj")])
def test_acceleration_does_not_count_an_output_layer_that_is_never_called(target, inner):
    model = get_peft_model(
        nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)), LoraConfig(target_modules=[target, "1"])
    )
    report = accelerate(model)
    assert report.accelerated == ["base_model.model.1"]
    assert "does not call it" in report.skipped[f"base_model.model.0{inner}"]
    assert list(report.without_lora) == ([] if target == "0" else ["base_model.model.0"])
