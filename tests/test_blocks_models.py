"""fuse_blocks on whole models: outputs and every gradient against the unfused model, with dropout over the same masks."""

import copy
import pickle

import pytest
import torch
from blocks_case import ALL, CASES, FUSED, SameMasks, check_same, results
from tiny_models import llama
from torch import nn

from lora_kernels import (
    LoRAConfig,
    add_lora,
    fuse_blocks,
    lora_parameters,
    merge_lora,
    remove_lora,
    unfuse_blocks,
    unmerge_lora,
)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_every_gradient_are_the_unfused_model_s(name):
    case = CASES[name]
    model, batch = case.model(), case.batch()
    expected = results(model, batch)
    report = fuse_blocks(model)
    assert (len(report.groups), len(report.mlps)) == (2 * case.groups, 2 * case.mlps)
    assert any(case.skipped in reason for reason in report.skipped.values()) if case.skipped else not report.skipped
    assert report.calls() == {FUSED: 0}, "looking for blocks is no call"
    check_same(results(model, batch), expected)
    assert report.calls() == {FUSED: len(report.groups) + len(report.mlps)}
    model.eval()
    fused = model(**batch)[0]
    unfuse_blocks(model)
    torch.testing.assert_close(fused, model(**batch)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "llama-some", "gemma3", "clip-gelu", "bert"])
def test_with_dropout_they_are_those_of_lora_linear_with_the_same_masks(name, monkeypatch):
    case = CASES[name]
    model, batch = case.model(lora_dropout=0.3), case.batch()
    without = results(case.model(), batch)
    SameMasks(model, monkeypatch)
    expected = results(model, batch)
    assert not torch.allclose(expected["y"], without["y"])
    report = fuse_blocks(model)
    check_same(results(model, batch), expected)
    assert report.calls()[FUSED] > 0


def test_a_trailing_dropout_of_the_mlp_s_own_is_kept():
    case = CASES["gpt2"]
    model, batch = case.model(), case.batch()
    for block in model.transformer.h:
        block.mlp.dropout.p = 0.5
    torch.manual_seed(3)
    expected = results(model, batch)
    report = fuse_blocks(model)
    torch.manual_seed(3)
    check_same(results(model, batch), expected)
    assert report.calls() == {FUSED: 2}


def test_what_is_saved_for_the_backward_pass_is_less_than_in_the_frozen_model():
    case = CASES["llama"]._replace(make=lambda: llama(intermediate_size=96))  # as many times the hidden size as Llama's
    frozen, batch = case.make().double().train(), case.batch()
    frozen.requires_grad_(False)
    adapted = case.model(lora_dropout=0.1, r=2)
    separate = saved_bytes(adapted, batch)
    fuse_blocks(adapted)
    fused = saved_bytes(adapted, batch)
    assert fused < saved_bytes(frozen, batch) < separate


def saved_bytes(model: nn.Module, batch: dict) -> int:
    """Of what autograd keeps of a forward pass from the embeddings on, which need a gradient here, without parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t):
        if (pointer := t.untyped_storage().data_ptr()) not in own:
            kept[pointer] = t.untyped_storage().nbytes()
        return t

    x = model.model.embed_tokens(batch["input_ids"]).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model.model(inputs_embeds=x).last_hidden_state
    assert y.requires_grad
    return sum(kept.values())


# ---- what models go through ----


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_fused_and_on_their_own(copier):
    model, batch = CASES["llama"].model(), CASES["llama"].batch()
    report = fuse_blocks(model)
    expected = results(model, batch)
    twin = copier(model)
    check_same(results(twin, batch), expected)
    assert fuse_blocks(twin).calls() == {FUSED: 8}, "its counters go on"
    twin.model.layers[0].mlp.up_proj.weight.data.zero_()
    twin.model.layers[0].self_attn.k_proj.weight.data.zero_()
    assert not torch.allclose(results(twin, batch)["y"], expected["y"])
    check_same(results(model, batch), expected)
    assert report.calls() == {FUSED: 8}
    unfuse_blocks(twin)
    assert type(twin.model.layers[0].mlp) is type(CASES["llama"].make().model.layers[0].mlp)


def test_everything_is_undone_exactly():
    model = CASES["llama"].model()
    before = [(type(module), {k: id(v) for k, v in vars(module).items()}) for module in model.modules()]
    contents = [{k: list(v) for k, v in vars(module).items() if k.endswith("_hooks")} for module in model.modules()]
    text, names = repr(model), list(model.state_dict())
    fuse_blocks(model)
    assert repr(model) == text
    assert list(model.state_dict()) == names
    fuse_blocks(model)
    unfuse_blocks(model)
    assert [(type(module), {k: id(v) for k, v in vars(module).items()}) for module in model.modules()] == before
    assert [{k: list(v) for k, v in vars(m).items() if k.endswith("_hooks")} for m in model.modules()] == contents
    unfuse_blocks(model)  # nothing to do


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant, monkeypatch):
    case = CASES["llama"]
    model, batch = case.model(lora_dropout=0.3), case.batch()
    report = fuse_blocks(model)
    torch.manual_seed(5)
    expected = results(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    check_same(results(model, batch), expected)
    assert report.calls() == {FUSED: 12 if reentrant else 10}, "the other stops where all is there again: in the last MLP"


def test_generation_with_a_cache():
    model = CASES["llama"].model().eval()
    tokens, options = CASES["llama"].batch()["input_ids"], {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(tokens, **options)
    report = fuse_blocks(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert report.calls() == {FUSED: 20}  # four operations a token


def test_torch_compile_in_one_graph():
    model, batch = CASES["llama"].model(), CASES["llama"].batch()
    expected, found = results(model, batch), []
    report = fuse_blocks(model)

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    check_same({name.replace("_orig_mod.", ""): t for name, t in results(compiled, batch).items()}, expected)
    assert sum("glu_mlp" in target for target in found) == 2
    assert report.calls() == {FUSED: 0}, "not counted in a graph"


def test_autocast():
    model, batch = CASES["llama"].model().float(), CASES["llama"].batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model, batch)
        report = fuse_blocks(model)
        got = results(model, batch)
    assert report.calls() == {FUSED: 4}
    check_same(got, expected, tolerance=0.05)


# ---- what becomes of adapters after fuse_blocks ----


def test_adapters_come_and_go_while_blocks_are_fused():
    case, batch = CASES["llama-some"], CASES["llama-some"].batch()
    model, plain = case.model(), case.model()
    report = fuse_blocks(model)
    for each in (model, plain):
        torch.manual_seed(2)
        add_lora(each, LoRAConfig(target_modules=ALL, r=2, init_lora_weights=False), "wide")
    check_same(results(model, batch), results(plain, batch))  # "default" is active still
    assert report.calls() == {FUSED: 4}, "an MLP looks up its layers at each call; of a new k_proj the group knows nothing"
    assert len(fuse_blocks(model).groups) == 2
    check_same(results(model, batch), results(plain, batch))
    for each in (model, plain):
        merge_lora(each)
        each.eval()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert report.calls()["an adapter is merged"] > 0
    unmerge_lora(model)
    remove_lora(model)
    unmerge_lora(plain)
    remove_lora(plain)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in case.make().modules()]


def test_a_model_without_lora_layers_is_an_error():
    with pytest.raises(ValueError, match=r"without LoRA layers.*call add_lora first, or accelerate"):
        fuse_blocks(CASES["llama"].make())


def test_the_report_is_for_people():
    report = fuse_blocks(CASES["bert"].model())
    assert str(report).splitlines()[0] == "fused blocks: 2 × {query,key,value}"
    assert "not fused: bert.encoder.layer.0.intermediate and 1 more: its MLP lies in two modules" in str(report)
    assert report.groups[0] == "bert.encoder.layer.0.attention.self.{query,key,value}"


def test_training_goes_as_without():
    losses = []
    for fused in (False, True):
        model, batch = CASES["llama-some"].model(), CASES["llama-some"].batch()
        if fused:
            fuse_blocks(model)
        optimizer = torch.optim.SGD(lora_parameters(model), lr=0.5)
        losses.append([])
        for _ in range(3):
            losses[-1].append(results(model, batch)["loss"].item())
            optimizer.step()
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][2] < losses[0][0]
