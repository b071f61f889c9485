"""add_lora and its companions on whole models: what is matched, changed, reported, refused and restored."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_adapter,
    unmerge_lora,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.out(torch.tanh(self.v_proj(self.q_proj(x)))))


class Model(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
QV = {"target_modules": ["q_proj", "v_proj"]}


def train(model, steps=3, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


# ---- matching ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["0.out", "0.q_proj", "0.v_proj", "1.out", "1.q_proj", "1.v_proj"]),
        (QV, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        ({"target_modules": ["blocks.1.out"]}, ["1.out"]),
        ({"target_modules": ["1.out", "0.q_proj"]}, ["0.q_proj", "1.out"]),
        ({"target_modules": r".*\.1\.(q|v)_proj"}, ["1.q_proj", "1.v_proj"]),
        ({"exclude_modules": ["out"]}, ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
        ({"exclude_modules": r"blocks\.0.*"}, ["1.out", "1.q_proj", "1.v_proj"]),
    ],
)
def test_target_modules(options, expected):
    model = Model()
    report = add_lora(model, LoRAConfig(**options))
    assert sorted(report.adapted) == [f"blocks.{path}" for path in expected]
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == list(report.adapted)


@pytest.mark.parametrize(
    "options",
    [
        {
            "target_modules": ["q_proj", "out"],
            "rank_pattern": {"q_proj": 2, "1.out": 3},
            "alpha_pattern": {r"blocks\.0\..*": 5},
        },
        {"target_modules": r".*(q_proj|out)", "exclude_modules": ["1.out"]},
        {"target_modules": ["proj"], "rank_pattern": {"proj": 4}},
        {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"0.v_proj": 16}},
    ],
)
def test_matches_what_peft_matches(options):
    peft = pytest.importorskip("peft")
    mine, theirs = Model(), Model()
    try:
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, lora_alpha=8, **options)).base_model.model
    except ValueError:
        with pytest.raises(ValueError, match="matches no linear layer"):
            add_lora(mine, LoRAConfig(r=8, lora_alpha=8, **options))
        return
    add_lora(mine, LoRAConfig(r=8, lora_alpha=8, **options))
    expected = {
        n: (m.r["default"], m.scaling["default"]) for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    layers = {n: m.adapters["default"] for n, m in mine.named_modules() if isinstance(m, LoRALinear)}
    assert {n: (a.r, a.scaling) for n, a in layers.items()} == expected


def test_output_head_and_other_layers_are_reported():
    model = Model(tie=False)
    model.attention = nn.MultiheadAttention(8, 2)
    model.blocks[0].out.forward = lambda x: x
    model.blocks[1].out.weight.data = model.blocks[1].out.weight.data.to(torch.float8_e4m3fn)
    report = add_lora(model, LoRAConfig())
    assert 'the output head, which "all-linear" leaves out' in report.skipped["lm_head"]
    assert "a NonDynamicallyQuantizableLinear, not an nn.Linear" in report.skipped["attention.out_proj"]
    assert "forward was replaced on the instance" in report.skipped["blocks.0.out"]
    assert "float8" in report.skipped["blocks.1.out"]
    assert type(model.lm_head) is nn.Linear
    text = str(report)
    assert "4 LoRA layers" in text
    assert "not adapted: lm_head" in text
    assert f"{report.trainable:,} of {report.total:,} parameters" in text
    assert report.trainable == sum(p.numel() for p in lora_parameters(model)) == 2 * (8 * 16 + 8 * 14)
    assert report.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["q_porj"]}, r"matches no linear layer of Model; near names: \['q_proj'.*; linear layers here"),
        ({"target_modules": ["norm"]}, "skipped: blocks.0.norm: a LayerNorm, not an nn.Linear"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: 'lm_haed' is not in Model; near names: \['lm_head'"),
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


def test_a_failure_halfway_changes_nothing(monkeypatch):
    model = Model()
    trainable, calls = flags(model), []
    original = LoRALinear.add_adapter

    def failing(self, *args, **options):
        calls.append(self)
        if len(calls) == 4:
            raise MemoryError
        original(self, *args, **options)

    monkeypatch.setattr(LoRALinear, "add_adapter", failing)
    with pytest.raises(MemoryError):
        add_lora(model, LoRAConfig())
    assert flags(model) == trainable
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, ValueError, "r: got 0"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]: got 0"),
        ({"lora_dropout": 2}, ValueError, r"lora_dropout: got 2, expected a probability in \[0, 1\]"),
        ({"bias": "lora"}, ValueError, "bias: got 'lora'"),
        (
            {"target_modules": "q_proj("},
            ValueError,
            "target_modules: got 'q_proj\\(', expected a list of names or a valid regex",
        ),
        ({"target_modules": []}, ValueError, r"target_modules: got \[\]"),
        ({"modules_to_save": "lm_head"}, TypeError, "modules_to_save: got 'lm_head', expected a list"),
    ],
)
def test_bad_configs(options, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**options)


def test_a_single_layer_cannot_be_exchanged():
    with pytest.raises(ValueError, match=r"model: got a single Linear.*use from_linear"):
        add_lora(nn.Linear(3, 4), LoRAConfig())


# ---- training, several adapters ----


def test_training_changes_only_the_adapter():
    model = Model()
    report = add_lora(model, LoRAConfig(r=2, **QV))
    before = snapshot(model)
    train(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{path}.lora_{m}.default" for path in report.adapted for m in "AB"}
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_base_model_is_one_call_away():
    model = Model()
    expected = model(TOKENS)
    add_lora(model, LoRAConfig(r=2, bias="all", modules_to_save=["lm_head", "norm"]))
    assert torch.allclose(model(TOKENS), expected, atol=1e-6)
    train(model)
    trained = model(TOKENS)
    assert not torch.allclose(trained, expected, atol=1e-4)
    set_adapter(model, None)
    assert torch.equal(model(TOKENS), expected), "no trained bias or module remains"
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS), trained)


def test_two_adapters():
    model = Model()
    add_lora(model, LoRAConfig(r=2, modules_to_save=["blocks.0.norm"], **QV))
    train(model)
    first = model(TOKENS)
    report = add_lora(model, LoRAConfig(r=3, target_modules=["q_proj", "out"], modules_to_save=["blocks.0.norm"]), "second")
    assert torch.equal(model(TOKENS), first), "a new adapter waits for set_adapter"
    assert len(report.adapted) == 4
    first_parameters = {id(p) for p in lora_parameters(model)}
    set_adapter(model, "second")
    assert not first_parameters & {id(p) for p in lora_parameters(model)}
    train(model)
    second = model(TOKENS)
    set_adapter(model, "default")
    assert torch.equal(model(TOKENS), first)
    set_adapter(model, "second")
    assert torch.equal(model(TOKENS), second)
    with pytest.raises(ValueError, match="adapter_name: got 'second', which is in use"):
        add_lora(model, LoRAConfig(**QV), "second")
    with pytest.raises(ValueError, match="bias: got 'all' for a second adapter, expected 'none'"):
        add_lora(model, LoRAConfig(bias="all", **QV), "third")
    with pytest.raises(KeyError, match="adapter 'x': not found"):
        set_adapter(model, "x")


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases(bias):
    model = Model()
    add_lora(model, LoRAConfig(bias=bias, **QV))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    own = {f"blocks.{i}.q_proj.bias" for i in range(2)}
    everything = own | {f"blocks.{i}.{name}.bias" for i in range(2) for name in ("out", "norm")}
    assert trained == {"none": set(), "lora_only": own, "all": everything}[bias]
    assert {f"{name}.default" for name in trained} == {name for name in lora_state_dict(model) if ".bias." in name}


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


# ---- shared, tied and absent weights ----


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


# ---- merging and removing ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge(dtype):
    model = Model().to(dtype).eval()
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    before, expected = snapshot(model), model(TOKENS)
    merge_lora(model)
    assert torch.allclose(model(TOKENS), expected, atol=1e-5 if dtype == torch.float32 else 0.2)
    for action in (merge_lora, lambda m: set_adapter(m, None), lambda m: add_lora(m, LoRAConfig(), "x")):
        with pytest.raises(RuntimeError, match=r"the model is merged; call unmerge_lora\(model\) first"):
            action(model)
    with pytest.raises(RuntimeError, match="gets no gradient"):
        model.train()(TOKENS)
    unmerge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="cannot unmerge: no layer is merged"):
        unmerge_lora(model)


def test_a_failed_merge_merges_nothing(monkeypatch):
    model, calls = Model(), []
    add_lora(model, LoRAConfig(r=2))
    original = LoRALinear.merge

    def failing(self):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        original(self)

    monkeypatch.setattr(LoRALinear, "merge", failing)
    with pytest.raises(MemoryError):
        merge_lora(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, LoRALinear))


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


def test_merge_then_remove_is_a_plain_fine_tuned_model():
    model = Model()
    add_lora(model, LoRAConfig(r=2, bias="all", modules_to_save=["lm_head"]))
    train(model)
    expected = model.eval()(TOKENS)
    merge_lora(model)
    remove_lora(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)


# ---- saving, copying ----


def test_state_dict_round_trip():
    config = LoRAConfig(r=2, bias="lora_only", modules_to_save=["blocks.0.norm", "lm_head"], **QV)
    base, model = Model(), Model()
    model.load_state_dict(base.state_dict())
    add_lora(model, config)
    train(model)
    state = {name: value.clone() for name, value in lora_state_dict(model).items()}
    assert {"blocks.0.q_proj.lora_A.default", "blocks.0.q_proj.bias.default"} <= state.keys()
    assert {"lm_head.modules_to_save.default.weight", "blocks.0.norm.modules_to_save.default.bias"} <= state.keys()
    add_lora(base, config)
    load_lora_state_dict(base, state)
    assert torch.equal(base(TOKENS), model(TOKENS))
    assert sum(p.numel() for p in lora_parameters(model)) == sum(value.numel() for value in state.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("blocks.0.q_proj.lora_A.default"), r"missing 1, such as \['blocks.0.q_proj.lora_A.default'\]"),
        (lambda s: s.update(x=torch.ones(1)), r"unknown 1, such as \['x'\]"),
        (
            lambda s: s.update({"blocks.0.q_proj.lora_A.default": torch.ones(3, 8)}),
            r"lora_A.default: got shape \(3, 8\), expected \(2, 8\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, words):
    model = Model()
    add_lora(model, LoRAConfig(r=2, **QV))
    before = snapshot(model)
    state = {name: torch.ones_like(value) for name, value in lora_state_dict(model).items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        load_lora_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
