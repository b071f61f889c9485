"""Convolutions and embeddings in whole models: add_lora, its report, merging, combining, PEFT's files in both directions."""

import copy

import pytest
import torch
from model_case import TOKENS, Model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_kernels import (
    AdaLoRAConfig,
    LoRAConfig,
    LoRAConv2d,
    LoRAEmbedding,
    add_lora,
    add_weighted_adapter,
    load_adapter,
    load_lora_state_dict,
    lora_parameters,
    lora_plus_param_groups,
    lora_state_dict,
    merge_lora,
    mixed_adapters,
    remove_lora,
    save_adapter,
    save_merged,
    set_adapter,
    unmerge_lora,
)

NAMES = ["embed", "conv", "point", "deep", "out"]
X, IDS = torch.randn(2, 3, 6, 6), torch.tensor([[1, 2, 0, 2], [5, 5, 5, 9]])


class Images(nn.Module):
    """An embedding that conditions convolutions, of which one is grouped, and a linear layer behind them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8, padding_idx=0)
        self.conv, self.point = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.deep, self.out = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 5)

    def forward(self, ids, x):
        x = self.conv(x) + self.embed(ids).mean(1)[:, :, None, None]
        return self.out(self.deep(self.point(x).tanh()).mean((2, 3)))


def images():
    torch.manual_seed(3)
    return Images().eval()


def adapted(names=NAMES, adapter="default", model=None, **options):
    model = images() if model is None else model
    add_lora(model, LoRAConfig(r=4, target_modules=list(names), **options), adapter)
    set_adapter(model, adapter)
    for parameter in lora_parameters(model):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_layers_that_are_named_are_adapted_and_grouped_ones_reported():
    model = images()
    before, y = copy.deepcopy(model.state_dict()), model(IDS, X)
    report = add_lora(model, LoRAConfig(r=4, target_modules=NAMES, rank_pattern={"conv": 2}))
    assert report.adapted == {"embed": 4, "conv": 2, "point": 4, "out": 4}
    assert "grouped Conv2d (groups=8)" in report.skipped["deep"]
    assert isinstance(model.conv, LoRAConv2d)
    assert isinstance(model.embed, LoRAEmbedding)
    assert report.trainable == sum(p.numel() for p in lora_parameters(model)) == 4 * 18 + 2 * 27 + 2 * 8 + 4 * 16 + 4 * 13
    assert torch.equal(model(IDS, X), y)
    remove_lora(model)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        key: tuple(value.shape) for key, value in before.items()
    }
    assert torch.equal(model(IDS, X), y)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_leaves_them_alone():
    assert list(add_lora(images(), LoRAConfig()).adapted) == ["out"]


def test_lora_plus_and_state_dicts():
    model, other = adapted(), adapted()
    groups = lora_plus_param_groups(model, 0.1, 4.0)
    assert [len(group["params"]) for group in groups] == [4, 4]
    load_lora_state_dict(other, lora_state_dict(model))
    assert torch.equal(other(IDS, X), model(IDS, X))


def test_merging_a_whole_model_and_back(tmp_path):
    model = adapted()
    y, state = model(IDS, X), {key: value.clone() for key, value in model.state_dict().items()}
    save_merged(model, tmp_path)
    plain = images()
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    close(plain(IDS, X), y)
    merge_lora(model)
    close(model(IDS, X), y)
    unmerge_lora(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_combining_adapters():
    model = adapted(adapter="a")
    ya = model(IDS, X)
    adapted(adapter="b", model=model)
    add_weighted_adapter(model, ["a", "b"], [1.0, 0.0], "sum", "cat")
    set_adapter(model, "sum")
    close(model(IDS, X), ya)
    add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "half")
    set_adapter(model, "half")
    assert model(IDS, X).isfinite().all()


@pytest.mark.parametrize("lora_bias", [False, True])
def test_files_of_ours_in_peft(lora_bias, tmp_path):
    model = adapted(NAMES[1:] if lora_bias else NAMES, lora_bias=lora_bias, lora_dropout=0.1, use_rslora=True)
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(images(), tmp_path).eval()
    close(theirs(IDS, X), model(IDS, X))
    again = images()
    loaded = load_adapter(again, tmp_path)
    assert set(loaded.adapted) == set(NAMES) - {"deep"} - ({"embed"} if lora_bias else set())
    assert torch.equal(again(IDS, X), model(IDS, X))


def test_files_of_peft_here(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed", "conv", "point", "out"], init_lora_weights=False)
    theirs = get_peft_model(images(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = images()
    load_adapter(model, tmp_path)
    close(model(IDS, X), theirs(IDS, X))
    merge_lora(model)
    merged = theirs.merge_and_unload()
    for name in ("embed", "conv", "point", "out"):
        close(model.get_submodule(name).weight, merged.get_submodule(name).weight)


def test_a_file_whose_shapes_do_not_fit_changes_nothing(tmp_path):
    save_adapter(adapted(), tmp_path)
    other = images()
    other.conv = nn.Conv2d(3, 8, 5)
    with pytest.raises(ValueError, match=r"conv.lora_A.weight' has shape \(4, 3, 3, 3\), expected \(4, 3, 5, 5\)"):
        load_adapter(other, tmp_path)
    assert type(other.embed) is nn.Embedding


def test_tied_heads_stay_tied():
    torch.manual_seed(3)
    model = Model().eval()
    y = model(TOKENS)
    report = add_lora(model, LoRAConfig(r=4, target_modules=["embed", "q_proj"]))
    assert "embed" in report.adapted
    assert model.embed.weight is model.lm_head.weight
    close(model(TOKENS), y)
    nn.init.normal_(model.embed.lora_A["default"])
    y = model(TOKENS)
    merge_lora(model)  # the embedding has a weight of its own meanwhile
    close(model(TOKENS), y)
    unmerge_lora(model)
    assert model.embed.weight is model.lm_head.weight
    assert torch.equal(model(TOKENS), y)
    remove_lora(model)
    assert model.embed.weight is model.lm_head.weight


WITHOUT = {
    "dora": (LoRAConfig(target_modules=NAMES, use_dora=True), "DoRA of"),
    "adalora": (AdaLoRAConfig(target_modules=NAMES, total_step=100), "AdaLoRA of"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_only_linear_layers_have(name):
    config, reason = WITHOUT[name]
    report = add_lora(images(), config)
    assert list(report.adapted) == ["out"]
    assert all(report.skipped[path].startswith(reason) for path in ("embed", "conv", "point"))


def test_other_embeddings_and_kinds_are_skipped_with_a_reason():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = nn.ModuleDict(
        {"a": Scaled(9, 4), "b": nn.Embedding(9, 4, max_norm=1.0), "c": nn.Conv1d(3, 3, 1), "d": nn.Linear(4, 4)}
    )
    skipped = add_lora(model, LoRAConfig(target_modules=["a", "b", "c", "d"])).skipped
    assert "a Scaled, not an nn.Embedding" in skipped["a"]
    assert "max_norm" in skipped["b"]
    assert "a Conv1d" in skipped["c"]


def test_in_4_bits_linear_layers_alone():
    report = add_lora(images(), LoRAConfig(r=2, target_modules=NAMES), quantize="nf4")
    reason = "no linear layer: only those have 4-bit weights here"
    assert report.left_dense == dict.fromkeys(("conv", "point", "embed"), reason)


def test_a_mixed_batch_is_refused():
    with (
        pytest.raises(ValueError, match="got one with embed, a LoRAEmbedding, expected linear layers alone"),
        mixed_adapters(adapted(), ["default", None]),
    ):
        pass


def test_no_single_layer_is_exchanged():
    with pytest.raises(ValueError, match="got a single Conv2d"):
        add_lora(nn.Conv2d(3, 3, 1), LoRAConfig(target_modules=["x"]))
