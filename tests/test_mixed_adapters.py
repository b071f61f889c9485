"""mixed_adapters: each sample of a batch is computed, and trains, as with its adapter alone."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lora_kernels import (
    LoRAConfig,
    add_lora,
    delete_adapter,
    fuse_blocks,
    lora_parameters,
    merge_lora,
    mixed_adapters,
    set_adapter,
    unmerge_lora,
)

NAMES = ["b", None, "a", "c", "a"]


def build(quantize=None, dropout=0.0, **options):
    """Three adapters of other ranks, scalings and layers: "c" is in the last layer alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    for name, r, targets in (("a", 4, ["0", "2"]), ("b", 7, ["0", "2"]), ("c", 2, ["2"])):
        config = LoRAConfig(r=r, target_modules=targets, init_lora_weights=False, lora_dropout=dropout, **options)
        add_lora(model, config, name, quantize=quantize if name == "a" else None)
    return model


def alone(model, x, names=NAMES):
    """Sample by sample, each by set_adapter."""
    ys = []
    for i, name in enumerate(names):
        set_adapter(model, name)
        ys.append(model(x[i : i + 1]))
    return torch.cat(ys)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_each_sample_is_computed_with_its_own(shape, quantize):
    model, x = build(quantize).eval(), torch.randn(5, *shape, 64)
    expected = alone(model, x)
    with mixed_adapters(model, NAMES):
        assert torch.allclose(model(x), expected, atol=1e-5)
    set_adapter(model, "b")
    with mixed_adapters(model, [None] * 5):
        assert torch.allclose(model(x), alone(model, x, [None] * 5), atol=1e-5)


def test_gradients_are_those_of_each_alone():
    model, x = build(), torch.randn(5, 7, 64)
    expected = {}
    for name in ("a", "b", "c"):
        set_adapter(model, name)
        own = torch.stack([row for row, of in zip(x, NAMES, strict=True) if of == name])
        names = [path for path, p in model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(model(own).square().sum(), [p for p in model.parameters() if p.requires_grad])
        expected |= dict(zip(names, grads, strict=True))
    set_adapter(model, None)
    with mixed_adapters(model, NAMES):
        y = model(x)
    y.square().sum().backward()
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for path, grad in expected.items():
        assert torch.allclose(found[path], grad, atol=1e-3, rtol=1e-4), path


def test_what_is_named_becomes_trainable_and_an_absent_one_gets_no_gradient():
    model, x = build(), torch.randn(2, 64)
    set_adapter(model, "c")
    with mixed_adapters(model, ["a", None]):
        parameters = lora_parameters(model)
        model(x).sum().backward()
    assert len(parameters) == 4 + 2  # a's, and c's, which was active
    assert {path.rpartition(".")[2] for path, p in model.named_parameters() if p.grad is not None} == {"a"}
    frozen = build().eval()
    set_adapter(frozen, "c")
    with mixed_adapters(frozen, ["a"]):
        assert len(lora_parameters(frozen)) == 2


@pytest.mark.parametrize("steps", [4])
def test_three_trained_in_one_batch_are_three_trained_alone(steps):
    """Same seeds, same losses, and the same weights after."""
    x, t = torch.randn(6, 5, 64), torch.randn(6, 5, 64)
    of = {name: slice(2 * i, 2 * i + 2) for i, name in enumerate("abc")}
    together, losses = build(), {name: [] for name in of}
    names = [name for name in of for _ in range(2)]
    with mixed_adapters(together, names):
        optimizer = torch.optim.AdamW(lora_parameters(together), lr=1e-2)
        for _ in range(steps):
            y = together(x)
            parts = {name: (y[rows] - t[rows]).square().mean() for name, rows in of.items()}
            optimizer.zero_grad()
            sum(parts.values()).backward()
            optimizer.step()
            for name, loss in parts.items():
                losses[name].append(loss.item())
    for name, rows in of.items():
        model = build()
        set_adapter(model, name)
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
        for step in range(steps):
            loss = (model(x[rows]) - t[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert loss.item() == pytest.approx(losses[name][step], rel=1e-4)
        assert losses[name][-1] < losses[name][0]
        for path, p in model.named_parameters():
            if path.endswith(f".{name}"):
                assert torch.allclose(p, together.get_parameter(path), atol=1e-4), path


def test_dropout_is_each_adapters_own():
    model = build(dropout=0.5)
    model[2].adapters["b"].lora_dropout = 0.0
    x = torch.randn(5, 7, 64)
    with mixed_adapters(model[2:], NAMES):
        first, second = model[2](torch.ones(5, 7, 96)), model[2](torch.ones(5, 7, 96))
    changed = [not torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert changed == [False, False, True, True, True]
    with mixed_adapters(model.eval(), NAMES):
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_inside(use_reentrant):
    model, x = build(dropout=0.3), torch.randn(5, 7, 64, requires_grad=True)
    grads = []
    for compute in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        model.zero_grad()
        with mixed_adapters(model, NAMES):
            compute(x).square().sum().backward()
        grads.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][path]) for path, grad in grads[0].items())


def test_checkpointing_with_a_backward_outside_is_an_error():
    """PyTorch sees that the layers saved something else."""
    model, x = build(), torch.randn(5, 7, 64, requires_grad=True)
    with mixed_adapters(model, NAMES):
        y = checkpoint(model, x, use_reentrant=False)
    set_adapter(model, None)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        y.sum().backward()


def test_fused_blocks_compute_layer_by_layer_meanwhile():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**size)).eval()
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False), name)
    ids = torch.randint(50, (3, 6))
    rows = []
    for i, name in enumerate(("a", None, "b")):
        set_adapter(model, name)
        rows.append(model(input_ids=ids[i : i + 1]).logits)
    report = fuse_blocks(model)
    with mixed_adapters(model, ["a", None, "b"]):
        assert torch.allclose(model(input_ids=ids).logits, torch.cat(rows), atol=1e-4)
    assert any("several adapters" in reason for reason in report.calls())


def test_layers_that_have_the_same_adapters_share_one_sort():
    from lora_kernels.layers import mixed

    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    for name in ("a", "b"):
        add_lora(model, LoRAConfig(r=2, target_modules=[str(i) for i in range(6)]), name)
    mixed._segments.cache_clear()
    with mixed_adapters(model, ["a", "b", None]):
        model(torch.randn(3, 4, 16))
    found = mixed._segments.cache_info()
    assert (found.misses, found.hits) == (1, 5)


def test_it_is_left_as_it_was():
    model, x = build().eval(), torch.randn(5, 64)
    set_adapter(model, "b")
    expected = model(x)
    with mixed_adapters(model, NAMES):
        outer = model(x)
        with mixed_adapters(model, ["a"] * 5):
            model(x)
        assert torch.equal(model(x), outer)
        with pytest.raises(ZeroDivisionError), mixed_adapters(model, ["c"] * 5):
            raise ZeroDivisionError
        assert torch.equal(model(x), outer)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["a", "d"], KeyError, r"adapter 'd': not found; adapters here: \['a', 'b', 'c'\]"),
        ("abc", TypeError, "names: got 'abc', expected a name, or None, for each sample"),
        ([], TypeError, r"names: got \[\]"),
        (["a", 3], TypeError, r"names: got \['a', 3\]"),
    ],
)
def test_names_that_do_not_fit(names, error, words):
    with pytest.raises(error, match=words), mixed_adapters(build(), names):
        pass


def test_what_cannot_be_mixed():
    model, x = build(), torch.randn(4, 64)
    with (
        pytest.raises(ValueError, match=r"names: got 5 for x \(4, 64\), expected one for each sample"),
        mixed_adapters(model, NAMES),
    ):
        model(x)
    set_adapter(model, "a")
    merge_lora(model)
    with pytest.raises(RuntimeError, match="cannot mix adapters: the model is merged"), mixed_adapters(model, NAMES):
        pass
    unmerge_lora(model)
    with mixed_adapters(model, ["a"] * 4):
        merge_lora(model)
        with pytest.raises(RuntimeError, match="cannot mix adapters: LoRALinear is merged"):
            model(x)
        unmerge_lora(model)
        delete_adapter(model, "a")
        with pytest.raises(KeyError, match="adapter 'a': not found"):
            model(x)
    for options, words in (
        ({"use_dora": True}, r"adapter 'a': got a magnitude \(DoRA\) in 0"),
        ({"lora_bias": True}, "adapter 'a': got a bias of its own"),
    ):
        with pytest.raises(ValueError, match=words), mixed_adapters(build(**options), ["a"]):
            pass
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_lora(model, LoRAConfig(r=2, target_modules=["0"], modules_to_save=["1"]), "a")
    add_lora(model, LoRAConfig(r=2, target_modules=["0"]), "b")
    for names, words in ((["a"], "adapter 'a': got one with its own 1"), (["b"], "adapter 'a': got its own 1 in place")):
        with pytest.raises(ValueError, match=words), mixed_adapters(model, names):
            pass
    with pytest.raises(ValueError, match="has no LoRA layers"), mixed_adapters(nn.Linear(2, 2), ["a"]):
        pass


def test_compiled():
    torch._dynamo.reset()
    layer, x = build().eval()[2], torch.randn(5, 96)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with mixed_adapters(layer, NAMES):
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)


def test_the_example_of_three_adapters(monkeypatch, tmp_path, capsys):
    """bench/three_adapters.py, in few steps; its losses together are those alone."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    example = importlib.import_module("three_adapters")
    assert example.main(["--steps", "2", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert [row["task"] for row in found["rows"]] == ["repeat", "reverse", "count"]
    assert "alone" in capsys.readouterr().out
    losses = {1: 1.0, 3: 1.002}  # of a task alone, and of three together
    monkeypatch.setattr(example, "train", lambda names, steps: ({name: [losses[len(names)]] for name in names}, 0.0))
    assert example.main([]) == 1
