"""add_lora(LoRAConfig(target_parameters=[…])): experts' stacks with adapters, their files, and all that changes a model."""

import copy
import io
import json

import peft
import pytest
import torch
from experts_case import IDS, MODELS, in_double, losses_of, moe, run, stacks
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    add_weighted_adapter,
    delete_adapter,
    load_adapter,
    merge_lora,
    mixed_adapters,
    remove_lora,
    save_adapter,
    save_merged,
    set_adapter,
    unmerge_lora,
)
from lora_kernels.mask import draw_seed, dropout_mask, keep_scale

PLACE = "base_model.model.model.layers.0.mlp.experts"


def adapted(name="Mixtral", adapter="default", model=None, **options):
    """A model whose experts have an adapter with B that is not zero."""
    model = moe(name) if model is None else model
    options = {"r": 3, "lora_alpha": 6, "target_parameters": stacks(moe(name)), **options}
    add_lora(model, LoRAConfig(**options), adapter)
    for path, parameter in model.named_parameters():
        if f".{adapter}" in path and ".lora_" in path:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_our_file_and_we_read_peft_s(name, tmp_path):
    """Numbers, gradients, keys, shapes and values are the same both ways."""
    model = adapted(name)
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(moe(name), tmp_path / "ours", is_trainable=True)
    exact, own = run(in_double(theirs)), run(model)
    assert torch.allclose(own.pop("logits").double(), exact.pop("logits").double(), atol=1e-5)
    for ours, value in zip(sorted(own.values(), key=torch.norm), sorted(exact.values(), key=torch.norm), strict=True):
        assert (ours - value).abs().max() <= 2e-5 * value.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")
    again, file = moe(name), "adapter_model.safetensors"
    assert load_adapter(again, tmp_path / "theirs").active
    assert torch.equal(logits(again), logits(model))
    ours, read = load_file(tmp_path / "ours" / file), load_file(tmp_path / "theirs" / file)
    assert ours.keys() == read.keys()
    assert all(torch.equal(ours[key], read[key]) for key in ours)


def test_names_and_state_dict_stay():
    plain, model = moe("GptOss"), adapted("GptOss")
    state = model.state_dict()
    assert {key for key in state if ".lora_" not in key} == set(plain.state_dict())
    assert {tuple(t.shape) for key, t in state.items() if "gate_up_proj.lora_" in key} == {(12, 32), (48, 12)}
    other = adapted("GptOss")
    nn.init.normal_(other.model.layers[0].mlp.experts.down_proj.weight)
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    assert repr(model.model.layers[0].mlp.experts.down_proj).startswith(
        "LoRAStack(\n  experts=4, in_features=24, out_features=32"
    )


def test_the_model_is_put_back():
    model, plain = adapted(), moe("Mixtral")
    before, kinds = logits(plain), [type(module) for module in plain.modules()]
    set_adapter(model, None)
    assert torch.allclose(logits(model), before, atol=1e-6)
    remove_lora(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_merged(name, tmp_path):
    model = adapted(name).eval()
    before, expected = logits(model), logits(model)
    save_merged(model, tmp_path)
    merge_lora(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    saved = load_file(tmp_path / "model.safetensors")
    model.train()
    with pytest.raises(RuntimeError, match="LoRAExperts is merged"):
        model(input_ids=IDS)
    unmerge_lora(model)
    assert torch.equal(logits(model), before)
    merge_lora(model)
    remove_lora(model)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert all(torch.allclose(saved[key], value.cpu(), atol=1e-6) for key, value in model.state_dict().items() if key in saved)
    assert sum(value.ndim == 3 for value in saved.values()) == 4


def test_several_adapters():
    model = adapted("Qwen2Moe", "first")
    first = logits(model)
    adapted("Qwen2Moe", "second", model, r=2)
    assert torch.equal(logits(model), first)
    set_adapter(model, "second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    add_weighted_adapter(model, ["first", "second"], [0.5, -2.0], "both", "cat")
    set_adapter(model, "both")
    both = logits(model)
    merge_lora(model, {"first": 0.5, "second": -2.0})
    with torch.no_grad():
        assert torch.allclose(logits(model), both, atol=1e-4)
    unmerge_lora(model)
    assert torch.equal(logits(model), both)
    expected = {}
    for path, layer in model.named_modules():
        if type(layer).__name__ == "LoRAStack":
            terms = {}
            for name in layer.adapters:
                layer.set_adapter(name)
                term = layer.active_term
                terms[name] = term.scaling * (term.B @ term.A)
            expected[path] = terms["both"] - (0.5 * terms["first"] - 2 * terms["second"])
    assert len(expected) == 4
    assert all(difference.abs().max() < 1e-4 for difference in expected.values())
    with (
        pytest.raises(ValueError, match="a LoRAStack, expected linear"),
        mixed_adapters(model, ["first", "second"]),
    ):
        pass
    delete_adapter(model, "both")
    set_adapter(model, "first")
    assert torch.equal(logits(model), first)


def test_dropout_has_the_mask_of_the_rows_as_they_lie(device):
    """PEFT's cannot have any; in evaluation there is none."""
    model = adapted("Mixtral", lora_dropout=0.4, target_parameters=["0.mlp.experts.gate_up_proj"])
    experts = model.model.layers[0].mlp.experts
    stack = experts.gate_up_proj
    x, ids, weights = (t.to(device) for t in (torch.randn(11, 32), torch.rand(11, 4).topk(2).indices, torch.rand(11, 2)))
    order = ids.flatten().sort(stable=True).indices
    torch.manual_seed(5)
    keep = dropout_mask(22, 32, 0.4, draw_seed(device), device=device) * keep_scale(0.4)
    term, e = stack.active_term, ids.flatten()[order]
    rows = x[order // 2]
    h = torch.einsum("mk,mnk->mn", rows, stack.weight[e])
    h += term.scaling * torch.einsum("mr,mnr->mn", torch.einsum("mk,mrk->mr", rows * keep, term.A[e]), term.B[e])
    gate, up = h.chunk(2, 1)
    y = torch.einsum("mk,mnk->mn", nn.functional.silu(gate) * up, experts.down_proj[e]) * weights.flatten()[order, None]
    expected = torch.zeros(11, 32, device=device).index_add(0, order // 2, y)
    torch.manual_seed(5)
    torch.testing.assert_close(experts(x, ids, weights), expected, rtol=1e-4, atol=1e-5)
    model.eval()
    assert torch.equal(experts(x, ids, weights), experts(x, ids, weights))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains(checkpointing):
    model = adapted("DeepseekV3", lora_dropout=0.1, target_modules=["q_b_proj"])
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        *("q_b_proj", "gate_up_proj", "down_proj")
    }
    losses = losses_of(model, steps=12)
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_copies_and_pickles(device):
    model = adapted()
    buffer = io.BytesIO()
    torch.save(model.model.layers[0].mlp.experts, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    call = [t.to(device) for t in (torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2))]
    assert torch.equal(read(*call), model.model.layers[0].mlp.experts(*call))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_compiles_as_one_graph(device):
    experts = adapted("Qwen3Moe").eval().model.layers[0].mlp.experts
    call = [t.to(device) for t in (torch.randn(6, 32), torch.rand(6, 8).topk(3).indices, torch.rand(6, 3))]
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*call), experts(*call))


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_a_transformers_model_is_saved_and_read_again(name, tmp_path):
    """transformers takes the experts apart and puts them together, and finds the stacks under their names."""
    model = adapted(name).eval()
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).to(model.device)
    load_adapter(read, tmp_path / "adapters")
    assert torch.allclose(logits(read), logits(model), atol=1e-6)


def exchanged(tensors):
    """A[E·r, in] and B[out, r·E] as PEFT before 0.20 had them: of the transposed stack."""
    return {
        key: torch.randn(len(t) if "lora_A" in key else other.shape[1], other.shape[0] if "lora_A" in key else t.shape[1])
        for key, t in tensors.items()
        for other in [tensors[key.replace("lora_A", "lora_C").replace("lora_B", "lora_A").replace("lora_C", "lora_B")]]
    }


@pytest.mark.parametrize("present", [False, True])
def test_the_layout_of_an_older_peft_is_refused(tmp_path, present):
    save_adapter(adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(exchanged(load_file(file)), file)
    model = adapted() if present else moe("Mixtral")
    before = logits(model)
    with pytest.raises(ValueError, match=r"PEFT before 0\.20, which exchanged in and out of experts' parameters"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("version", "name", "fits"),
    [
        *(("0.18.1", "Mixtral", False), ("0.19.0", "Mixtral", False), ("0.20.0", "Mixtral", True)),
        *(("0.18.1", "GptOss", True), ("0.19.1", "GptOss", False), ("0.21.2", "GptOss", True)),
    ],
)
def test_of_square_stacks_the_version_says_it(tmp_path, monkeypatch, version, name, fits):
    monkeypatch.setitem(MODELS, name, {**MODELS[name], "intermediate_size": 32})
    save_adapter(adapted(name, target_parameters=["experts.down_proj"]), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_version": version}))
    if fits:
        load_adapter(moe(name), tmp_path)
        return
    with pytest.raises(ValueError, match=rf"of PEFT {version}, which exchanged"):
        load_adapter(moe(name), tmp_path)
