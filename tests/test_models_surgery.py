"""add_lora and remove_lora: what changes, what is shared or tied, refused and restored."""

import copy
import pickle

import pytest
import torch
from model_case import QV, TOKENS, Model, fail_at, flags, snapshot, train
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_porj"]}, r"matches no linear layer of Model; near names: \['q_proj'.*; linear layers here"),
        ({"target_modules": ["norm"]}, "skipped: blocks.0.norm: a LayerNorm, not an nn.Linear"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed' matches no module of Model; near names: \['lm_head'"),
        ({"init_lora_weights": "pissa", "r": 7}, "r: got 7, expected at most 6"),
    ],
)
def test_refusals_change_nothing(options, words):
    model = Model()
    before, trainable = snapshot(model), flags(model)
    with pytest.raises(ValueError, match=words):
        add_lora(model, LoRAConfig(**options))
    assert flags(model) == trainable
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not hasattr(model, "_lora_state")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            {"modules_to_save": ["out"]},
            {"target_modules": ["q_proj", "out"]},
            "target_modules: got blocks.0.out, but blocks.0.out",
        ),
        (
            {"modules_to_save": ["out"]},
            {"target_modules": "all-linear"},
            "target_modules: got blocks.0.out, but blocks.0.out is",
        ),
        (
            {"modules_to_save": ["1"]},
            {"target_modules": ["out"]},
            r"got blocks.1.out, but blocks.1 is trained whole by \['default'\]",
        ),
        (
            {},
            {"target_modules": ["out"], "modules_to_save": ["q_proj"]},
            r"modules_to_save: got blocks.0.q_proj, but .* \['default'\]",
        ),
        (
            {"target_modules": ["1.v_proj"]},
            {"target_modules": ["0.out"], "modules_to_save": ["1"]},
            "modules_to_save: got blocks.1, but blocks.1.v_proj is trained by",
        ),
        ({"modules_to_save": ["1"]}, {"modules_to_save": ["1.norm"]}, "modules_to_save: got blocks.1.norm, but blocks.1 is"),
        ({"modules_to_save": ["1.norm"]}, {"modules_to_save": ["1"]}, "modules_to_save: got blocks.1, but blocks.1.norm is"),
    ],
)
def test_what_another_adapter_trains_in_another_way_is_refused(first, second, words):
    """One of the two would be in one copy of the other's, and could not be switched, saved or loaded."""
    model, targets = Model(), {"target_modules": ["0.q_proj", "0.v_proj"]}
    add_lora(model, LoRAConfig(**{**targets, **first}))
    before, trainable = snapshot(model), flags(model)
    with pytest.raises(ValueError, match=words):
        add_lora(model, LoRAConfig(**{**targets, **second}), "second")
    assert snapshot(model).keys() == before.keys()
    assert flags(model) == trainable
    assert list(model._lora_state.configs) == ["default"]


def test_a_trained_bias_of_a_layer_that_a_second_adapter_wraps(tmp_path):
    """It is trained on, and saved as that of the plain layer that it is without the second one."""
    model = Model(tie=False)
    add_lora(model, LoRAConfig(bias="all", **QV))
    add_lora(model, LoRAConfig(target_modules=["out"]), "second")
    assert model.blocks[0].out.bias.requires_grad
    before = model.blocks[0].out.bias.clone()
    train(model)
    assert not torch.equal(model.blocks[0].out.bias, before)
    save_adapter(model, tmp_path)
    read = Model(tie=False)
    set_adapter(model, None)
    read.load_state_dict({name: value for name, value in model.state_dict().items() if "lora" not in name})
    load_adapter(read, tmp_path)
    set_adapter(model, "default")
    torch.testing.assert_close(read(TOKENS), model(TOKENS))


def test_a_failure_halfway_changes_nothing(monkeypatch):
    model = Model()
    trainable = flags(model)
    fail_at(monkeypatch, 4)
    with pytest.raises(MemoryError):
        add_lora(model, LoRAConfig())
    assert flags(model) == trainable
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_adapters_of_16_bit_models_are_float32_unless_asked():
    model = add_and_return(Model().bfloat16(), LoRAConfig(r=2))
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    model(TOKENS).float().sum().backward()
    model = Model().bfloat16()
    add_lora(model, LoRAConfig(r=2), autocast_adapter_dtype=False)
    assert {p.dtype for p in lora_parameters(model)} == {torch.bfloat16}


def add_and_return(model, config):
    add_lora(model, config)
    return model


def test_tied_head():
    """The head adapts over the embedding's own weight; merging leaves the embedding alone."""
    model = Model()
    add_lora(model, LoRAConfig(target_modules=["lm_head"], r=2, init_lora_weights=False))
    assert model.lm_head.weight is model.embed.weight
    before, expected = model.embed.weight.clone(), model.eval()(TOKENS)
    merge_lora(model)
    assert torch.equal(model.embed.weight, before)
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)
    unmerge_lora(model)
    assert model.lm_head.weight is model.embed.weight
    remove_lora(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight


def test_a_module_in_two_places_stays_one():
    model = Model()
    model.blocks[1].q_proj = model.blocks[0].q_proj
    original = model.blocks[0].q_proj
    add_lora(model, LoRAConfig(r=2, **QV))
    assert isinstance(model.blocks[0].q_proj, LoRALinear)
    assert model.blocks[1].q_proj is model.blocks[0].q_proj
    remove_lora(model)
    assert model.blocks[0].q_proj is original
    assert model.blocks[1].q_proj is original


def test_meta_device():
    with torch.device("meta"):
        model = Model(tie=False)
    add_lora(model, LoRAConfig(r=2))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.load_state_dict(Model(tie=False).state_dict(), strict=False)
    for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
        layer.reset_lora_parameters("default")
    assert model(TOKENS).isfinite().all()


def test_transformer_encoder_uses_the_adapter_in_evaluation():
    """PyTorch's fused inference path reads linear1.weight and would miss the adapter."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(layer)
    add_lora(model, LoRAConfig(target_modules=["linear1", "linear2"], r=2, init_lora_weights=False))
    x = torch.randn(2, 3, 8)
    expected = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), expected, atol=1e-5)
    remove_lora(model)
    assert layer.activation_relu_or_gelu == 1


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_remove_restores_everything(init):
    model = Model()
    model.blocks[0].q_proj.weight.requires_grad_(False)
    modules, before, trainable = dict(model.named_modules()), snapshot(model), flags(model)
    add_lora(model, LoRAConfig(r=2, bias="all", modules_to_save=["lm_head"], init_lora_weights=init))
    train(model)
    remove_lora(model)
    assert dict(model.named_modules()) == modules
    assert flags(model) == trainable
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or (init is not True and torch.allclose(value, before[name], atol=1e-6))
    with pytest.raises(ValueError, match="Model has no LoRA layers; call add_lora first"):
        remove_lora(model)
    add_lora(model, LoRAConfig(r=2))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model(clone):
    model = Model()
    add_lora(model, LoRAConfig(r=2, modules_to_save=["lm_head"], bias="all"))
    train(model)
    other = clone(model)
    assert torch.equal(other(TOKENS), model(TOKENS))
    trained = snapshot(model)
    train(other)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    remove_lora(other)
    set_adapter(model, None)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_half_and_double():
    model = Model()
    add_lora(model, LoRAConfig(r=2, modules_to_save=["lm_head"]))
    train(model)
    expected = model(TOKENS)
    assert torch.allclose(model.double()(TOKENS).float(), expected, atol=1e-5)
    assert torch.allclose(model.half()(TOKENS).float(), expected, atol=0.05)
    set_adapter(model, None)
    assert model(TOKENS).dtype == torch.float16, "what was put aside follows the model's dtype"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_real_architectures(architecture):
    """all-linear on tiny transformers models: the head stays, Conv1D is adapted, a step lowers the loss."""
    transformers = pytest.importorskip("transformers")
    if architecture == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model, per_layer = transformers.LlamaForCausalLM(config), 7
    elif architecture == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
        per_layer = 4
    else:
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model, per_layer = transformers.BertForSequenceClassification(config), 6
    report = add_lora(model, LoRAConfig(r=2, lora_dropout=0.1))
    assert len(report.adapted) == 2 * per_layer + (architecture == "bert")  # BERT's pooler is a linear layer
    assert all("output head" in reason for reason in report.skipped.values())
    assert len(report.skipped) == 1
    tokens = torch.arange(24).reshape(2, 12)
    labels = torch.tensor([0, 1]) if architecture == "bert" else tokens
    optimizer = torch.optim.Adam(lora_parameters(model), lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
