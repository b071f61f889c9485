"""save_merged: the values, the files, the memory, what transformers reads back."""

import copy
import itertools
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels import LoRAConfig, add_lora, lora_parameters, merge_lora, remove_lora, save_merged, set_adapter
from lora_kernels.commands.measure import peak_bytes
from lora_kernels.models.export import merged_tensors


def tuned(quantize, dtype=torch.bfloat16, sizes=(64, 96, 64), **config):
    layers = [nn.Linear(K, N) for K, N in itertools.pairwise(sizes)]
    model = nn.Sequential(*layers, nn.LayerNorm(sizes[-1])).to(dtype)
    model.register_buffer("steps", torch.tensor(3))
    add_lora(model, LoRAConfig(r=4, target_modules=[str(i) for i in range(len(layers))], **config), quantize=quantize)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_().mul_(0.1)
    return model


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_values(quantize, dtype, tmp_path):
    model = tuned(quantize, bias="lora_only")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = copy.deepcopy(model)
    for i in (0, 1):
        layer = expected[i]
        W = layer.matrix.dequantize(torch.float32) if quantize else layer.weight.float()
        merged = W + layer.adapters["default"].scaling * (layer.lora_B["default"] @ layer.lora_A["default"])
        expected[i] = nn.Linear(*W.T.shape)
        expected[i].weight, expected[i].bias = nn.Parameter(merged.to(dtype or torch.bfloat16)), layer.bias
    plain = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in expected.state_dict().items()}
    found = load_file(save_merged(model, tmp_path / "out", dtype=dtype))
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, msg=name)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora_bias", [True, False])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_merged_model_and_one_without_an_active_adapter(quantize, lora_bias, bias, tmp_path):
    model = tuned(quantize, lora_bias=lora_bias)
    if not bias:
        model[0].bias = None
    merged = dict(merged_tensors(model))
    assert ("0.bias" in merged) == (bias or lora_bias)
    merge_lora(model.eval())
    found = dict(merged_tensors(model))
    assert found.keys() == merged.keys()
    assert all(torch.equal(t, found[name]) for name, t in merged.items() if quantize is None or name.endswith("bias"))
    remove_lora(model)
    assert model.state_dict().keys() == merged.keys()
    with pytest.raises(ValueError, match="no LoRA layers"):
        save_merged(model, tmp_path)


@pytest.mark.parametrize("init_lora_weights", [True, "pissa"])
def test_without_an_active_adapter_it_is_the_base_model(init_lora_weights):
    model = nn.Sequential(nn.Linear(8, 6))
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    add_lora(model, LoRAConfig(r=2, init_lora_weights=init_lora_weights))
    set_adapter(model, None)
    for name, tensor in merged_tensors(model):
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(("quantize", "copies"), [("nf4", 2), (None, 3)])
def test_memory_is_a_shard_and_one_layer_s(quantize, copies, tmp_path):
    """Of twelve layers of 512 x 512, one is in up to three float32 copies while it is made; those made are kept for a shard."""
    model = tuned(quantize, sizes=(512,) * 13)
    dense, small = 512 * 512 * 4, 1 << 16
    layer = peak_bytes(lambda: save_merged(model, tmp_path, max_shard_size=1))
    assert layer < copies * dense + small
    assert peak_bytes(lambda: save_merged(model, tmp_path, max_shard_size=2 * dense)) <= layer + 2 * dense
    assert peak_bytes(lambda: save_merged(model, tmp_path)) > 6 * dense, "all twelve, in 16 bits"


@pytest.mark.parametrize("max_shard_size", [1, 13_000, 25_000])
def test_shards(max_shard_size, tmp_path):
    """Files of at most max_shard_size bytes of tensors, or of one tensor, all in the index, and nothing else."""
    model = tuned("nf4", sizes=(64, 96, 64, 32))
    expected = dict(merged_tensors(model))
    index = save_merged(model, tmp_path, max_shard_size=max_shard_size)
    assert index == tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    files = sorted({*content["weight_map"].values()})
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert sorted(os.listdir(tmp_path)) == [*files, index.name]
    found = {}
    for file in files:
        shard = load_file(tmp_path / file)
        assert all(content["weight_map"][name] == file for name in shard)
        assert sum(t.nbytes for t in shard.values()) <= max_shard_size or len(shard) == 1
        found.update(shard)
    assert found.keys() == content["weight_map"].keys() == expected.keys()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_model_of_just_one_shard_has_no_index(tmp_path):
    model = tuned(None)
    size = sum(t.nbytes for _, t in merged_tensors(model))
    assert save_merged(model, tmp_path / "one", max_shard_size=size) == tmp_path / "one" / "model.safetensors"
    assert save_merged(model, tmp_path / "two", max_shard_size=size - 1).suffix == ".json"


def test_an_earlier_model_s_files_go(tmp_path):
    """transformers would read model.safetensors beside an index, and the index's shards would stay beside a single file."""
    model = tuned(None)
    (tmp_path / "tokenizer.json").touch()
    save_merged(model, tmp_path)
    save_merged(model, tmp_path, max_shard_size=1)
    assert not (tmp_path / "model.safetensors").exists()
    save_merged(model, tmp_path, max_shard_size=20_000)
    files = {*json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()}
    assert {*os.listdir(tmp_path)} == files | {"model.safetensors.index.json", "tokenizer.json"}
    save_merged(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors", "tokenizer.json"]


def test_tensors_that_overlap_are_written_whole(tmp_path):
    model = tuned(None)
    model.register_buffer("row", model[2].weight[None])
    found = load_file(save_merged(model, tmp_path))
    assert torch.equal(found["row"][0], found["2.weight"])


def test_bad_shard_sizes(tmp_path):
    for size in (0, -1, "5GB"):
        with pytest.raises(ValueError, match=f"max_shard_size: got {size!r}, expected a number of bytes of at least 1"):
            save_merged(tuned(None), tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("max_shard_size", [1, 4 << 30])
def test_an_error_leaves_no_file(max_shard_size, tmp_path, monkeypatch):
    weights = [torch.ones(96, 64)]  # of the first layer
    monkeypatch.setattr("lora_kernels.models.export._merged_weight", lambda *_: weights.pop() if weights else 1 / 0)
    model = tuned("nf4")
    with pytest.raises(ZeroDivisionError):
        save_merged(model, tmp_path, max_shard_size=max_shard_size)
    assert list(tmp_path.iterdir()) == []


def test_files_have_the_umask_s_permissions(tmp_path):
    save_merged(tuned(None), tmp_path)
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("max_shard_size", [4 << 30, 100_000])
def test_transformers_reads_the_exported_model(max_shard_size, tmp_path):
    import tiny_llama
    from transformers import AutoModelForCausalLM

    tiny_llama.write(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    add_lora(model, LoRAConfig(r=4, init_lora_weights=False, target_modules="all-linear"), quantize="nf4")
    ids = torch.randint(0, 200, (2, 12))
    written = save_merged(model, tmp_path / "out", max_shard_size=max_shard_size)
    assert (written.suffix == ".json") == (max_shard_size == 100_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.dtype == torch.float32
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def merged_weight(layer):
    return layer.weight + layer.adapters["default"].scaling * layer.lora_B["default"] @ layer.lora_A["default"]


@pytest.mark.parametrize("targets", [["head"], ["head", "twin"]])
@pytest.mark.parametrize("order", itertools.permutations(["embed", "head", "twin"]), ids="-".join)
def test_an_adapted_layer_of_a_tied_weight_has_its_own(order, targets):
    """It is not left out as one that is there already, and what it was tied to does not become the merged one."""
    parts = {"embed": nn.Embedding(11, 8), "head": nn.Linear(8, 11), "twin": nn.Linear(8, 11)}
    parts["head"].weight = parts["twin"].weight = parts["embed"].weight
    model = nn.ModuleDict({name: parts[name] for name in order})
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, target_modules=targets))
    found = dict(merged_tensors(model))
    others = [name for name in order if name not in targets]
    assert {name for name in found if "weight" in name} == {f"{name}.weight" for name in [*targets, others[0]]}
    assert torch.equal(found[f"{others[0]}.weight"], model["embed"].weight)
    for name in targets:
        torch.testing.assert_close(found[f"{name}.weight"], merged_weight(model[name]))


def test_an_adapted_layer_in_two_places_is_given_once():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": layer})
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, lora_bias=True))
    found = dict(merged_tensors(model))
    assert found.keys() == {"a.weight", "a.bias"}
    torch.testing.assert_close(found["a.weight"], merged_weight(model["a"]))


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("gpt2", False), ("t5", True)], ids=["llama", "gpt2", "t5 ties its embeddings too"]
)
@pytest.mark.parametrize("merged", [False, True], ids=["save_merged", "save_pretrained"])
@pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_transformers_reads_an_adapted_head_that_was_tied(kind, tied, merged, config, tmp_path):
    import tiny_models

    model = tiny_models.MODELS[kind].make(**({"tie_word_embeddings": True} if kind == "llama" else {})).eval()
    targets = {"target_modules": tiny_models.MODELS[kind].target_modules}
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, **{**targets, **config}))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1)
    if merged:
        merge_lora(model)
        model.save_pretrained(tmp_path)
    else:
        save_merged(model, tmp_path)
    assert model.config.tie_word_embeddings, "the model's own stays"
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] == tied
    read = type(model).from_pretrained(tmp_path).eval()
    batch = {name: t for name, t in tiny_models.MODELS[kind].batch().items() if name != "attention_mask"}
    torch.testing.assert_close(read(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_stays_tied_is_written_so(tmp_path):
    import tiny_models

    model = tiny_models.llama(tie_word_embeddings=True)
    add_lora(model, LoRAConfig(r=2, target_modules=["lm_head", "q_proj"]))
    set_adapter(model, None)
    save_merged(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_linear4bit_without_an_adapter_is_dequantised():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, bias=True), nn.Linear(96, 64)).to("cpu").train()
    add_lora(model, LoRAConfig(r=2, target_modules=["1"]))
    found = dict(merged_tensors(model))
    assert found.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(found["0.weight"], bnb.functional.dequantize_4bit(model[0].weight, model[0].weight.quant_state))
