"""Adapter files that do not fit: a clear error, and nothing has changed."""

import json

import pytest
import torch
from adapter_case import CONFIG, IDS, WEIGHTS, close, model, own_adapter, peft_adapter
from safetensors.torch import load_file, save_file

from lora_kernels import LoRAConfig, add_lora, load_adapter, merge_lora, save_adapter


def change_config(**values):
    def change(directory):
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **values}))

    return change


def change_weights(function):
    def change(directory):
        tensors = load_file(directory / WEIGHTS)
        save_file({k: v.contiguous().clone() for k, v in function(tensors).items()}, directory / WEIGHTS, {"format": "pt"})

    return change


def cut_off(name):
    def change(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) * 2 // 3])

    return change


def rename_to_bin(directory):
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
NORM = "base_model.model.layers.0.norm.lora_A.weight"
EMBEDDING = {f"base_model.model.embed_tokens.lora_embedding_{side}": torch.ones(4, 11) for side in "AB"}
ODD = [  # values of another type than the field's, and regexes that are none
    *(("modules_to_save", value) for value in ("lm_head", [3], {"lm_head": 1})),
    *(("target_modules", value) for value in (5, [5], {"q_proj": 1}, "(")),
    *(("exclude_modules", value) for value in (3, [None], "(")),
    *((name, value) for name in ("rank_pattern", "alpha_pattern") for value in (["q"], "q", {"(": 1})),
    *(("layers_to_transform", value) for value in ("0", ["0"], 0.5)),
    *((name, value) for name in ("use_rslora", "lora_bias", "use_dora") for value in (1, "yes")),
]
DAMAGES = [
    (
        change_weights(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}),
        "begin with 'base_model.model.'",
    ),
    (change_weights(lambda t: {k: v for k, v in t.items() if k != KEY}), f"missing 1 of 8, such as '{KEY}'"),
    (change_weights(lambda t: {**t, KEY.replace("lora_A", "lora_C"): t[KEY]}), "unknown .*lora_C.*near: .*lora_"),
    (change_weights(lambda t: {**t, "extra": t[KEY]}), r"but 1 of 9 do not: \['extra'\]"),
    (change_weights(lambda t: {**t, "base_model.model.extra": t[KEY]}), "unknown 'base_model.model.extra'$"),
    (change_weights(lambda t: {**t, "base_model.model.lora_magnitude_vector": t[KEY]}), "unknown .*magnitude"),
    (change_weights(lambda t: {**t, **EMBEDDING}), r"unknown '[^']*lora_embedding_A'"),
    (change_weights(lambda t: {**t, NORM.replace("norm", "fc"): t[KEY]}), "unknown .*fc"),
    (change_weights(lambda t: {**t, NORM: t[KEY]}), r"adapts layers\.0\.norm \(LayerNorm\)"),
    (change_weights(lambda t: {**t, KEY: t[KEY].where(t[KEY] > 0, float("nan"))}), f"'{KEY}' holds NaN or infinity"),
    (change_weights(lambda t: {**t, KEY: t[KEY].bfloat16() * float("inf")}), "holds NaN or infinity in 32 of 32 values"),
    (change_weights(lambda t: {**t, KEY: t[KEY].T}), r"has shape \(8, 4\), expected \(4, 8\)"),
    (change_weights(lambda t: {**t, KEY: t[KEY].int()}), "has dtype torch.int32"),
    (change_weights(lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(11, 8)}), "another base weight"),
    (change_weights(lambda t: {k.replace("layers", "blocks"): v for k, v in t.items()}), "missing 8 of 8"),
    (change_weights(lambda t: {}), "expected keys that begin with"),
    (change_config(r=8), r"has shape \(4, 8\), expected \(8, 8\)"),
    (change_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which rewrote the base weight"),
    (change_config(init_lora_weights="olora"), "rewrote the base weight"),
    (change_config(use_dora=True), "missing 4 .*_vector', which DoRA has: use_dora is true|use_dora is True, but this model"),
    (change_config(peft_type="IA3"), "peft_type is 'IA3'"),
    (change_config(target_modules=["nothing"]), "matches no linear layer"),
    (change_config(target_modules=None), "target_modules is missing"),
    (change_config(r=0), "r: got 0"),
    (change_config(a_new_field={"x": 1}), "a_new_field"),
    *((change_config(**{name: value}), f"{CONFIG}: {name}: got ") for name, value in ODD),
    (change_config(layers_to_transform=[0], layers_pattern="("), rf"{CONFIG}: layers_pattern: got '\('"),
    (cut_off(CONFIG), "not JSON, or cut off"),
    (cut_off(WEIGHTS), "no safetensors file, or cut off"),
    (rename_to_bin, "adapter_model.bin is a pickle"),
]


# An adapter that is there is compared by its tensors and scaling; where the file's names would go is not asked.
ONLY_NEW = ("has shape \\(4, 8\\), expected \\(8, 8\\)", "matches no linear layer")


@pytest.mark.parametrize(
    ("damage", "message", "existing"),
    [(damage, message, existing) for damage, message in DAMAGES for existing in (False, True)[: 1 + (message not in ONLY_NEW)]],
)
def test_a_clear_error_and_nothing_has_changed(tmp_path, damage, message, existing):
    save_adapter(own_adapter(), tmp_path)
    target = own_adapter() if existing else model()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    types, flags = [type(m) for m in target.modules()], [p.requires_grad for p in target.parameters()]
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(target, tmp_path)
    assert [type(m) for m in target.modules()] == types
    assert [p.requires_grad for p in target.parameters()] == flags
    assert target.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("target_modules", [["q_proj", "embed_tokens"], ["embed_tokens"]])
def test_peft_s_adapter_of_an_embedding_is_read(tmp_path, target_modules):
    """With the embedding's own weight, which PEFT writes beside it."""
    theirs, ours = peft_adapter(tmp_path, target_modules=target_modules), model()
    loaded = load_adapter(ours, tmp_path)
    assert "embed_tokens" in loaded.adapted
    close(ours(IDS), theirs(IDS))


def test_a_trained_module_may_not_hold_nan_but_its_buffers_may(tmp_path):
    base = model()
    base.layers[0].norm.register_buffer("mask", torch.full((3,), -torch.inf))
    ours = own_adapter(base=base, modules_to_save=["layers.0.norm"])
    save_adapter(ours, tmp_path)
    fresh = model()
    fresh.layers[0].norm.register_buffer("mask", torch.zeros(3))
    load_adapter(fresh, tmp_path)
    assert fresh.layers[0].norm.mask.isinf().all()
    norm = "base_model.model.layers.0.norm.weight"
    change_weights(lambda t: {**t, norm: t[norm] * torch.inf})(tmp_path)
    with pytest.raises(ValueError, match=f"'{norm}' holds NaN or infinity"):
        load_adapter(fresh, tmp_path)


@pytest.mark.parametrize("options", [None, {}, {"modules_to_save": ["norm"]}], ids=str)
def test_a_model_on_the_meta_device_would_lose_the_values(tmp_path, options):
    save_adapter(own_adapter(**options or {}), tmp_path)
    empty = model() if options is None else own_adapter(**options)
    with pytest.raises(ValueError, match="on the meta device, where values are lost: load its weights first"):
        load_adapter(empty.to("meta"), tmp_path)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("base", "value", "autocast", "fits"),
    [
        (torch.float32, torch.tensor(1e300, dtype=torch.float64), True, False),
        (torch.float32, torch.tensor(1e30, dtype=torch.float64), True, True),
        (torch.float16, torch.tensor(1e6), False, False),
        (torch.float16, torch.tensor(1e6), True, True),
        (torch.bfloat16, torch.tensor(3.4028e38), False, False),
    ],
)
def test_values_beyond_the_adapter_s_dtype(tmp_path, base, value, autocast, fits, existing):
    save_adapter(own_adapter(), tmp_path)
    change_weights(lambda t: {**t, KEY: value.expand(4, 8)})(tmp_path)
    target = model().to(base)
    if existing:
        add_lora(target, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]), autocast_adapter_dtype=autocast)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    if fits:
        load_adapter(target, tmp_path, autocast_adapter_dtype=autocast)
        assert target.layers[0].q_proj.lora_A["default"].isfinite().all()
        return
    with pytest.raises(ValueError, match=f"'{KEY}' has 32 of 32 values beyond .*'s largest.*wider dtype"):
        load_adapter(target, tmp_path, autocast_adapter_dtype=autocast)
    assert target.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_adapter(model(), tmp_path / "nowhere")


def test_an_adapter_that_scales_otherwise_does_not_go_into_one_that_is_there(tmp_path):
    save_adapter(own_adapter(lora_alpha=16), tmp_path)
    with pytest.raises(ValueError, match=r"scales layers\.0\.q_proj by 4, but this model's adapter 'default' by 2"):
        load_adapter(own_adapter(lora_alpha=8), tmp_path)


def test_loading_into_a_merged_model_is_an_error(tmp_path):
    ours = own_adapter()
    save_adapter(ours, tmp_path)
    merge_lora(ours)
    with pytest.raises(RuntimeError, match="unmerge_lora"):
        load_adapter(ours, tmp_path)


LOST = r"1 of its tensors are lost: '[\w.]*layers\.1\.q_proj\.lora_B\.weight' holds NaN or infinity in 1 of 32 values"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m: add_lora(m, LoRAConfig(init_lora_weights="pissa", target_modules=["q_proj"], r=2)),
            ValueError,
            "rewrote the base",
        ),
        (lambda m: None, ValueError, "no LoRA layers; call add_lora first"),
        (lambda m: own_adapter("sql", m), KeyError, r"adapter 'default': not found; adapters here: \['sql'\]"),
        (lambda m: setattr(own_adapter(base=m).layers[0].q_proj.adapters["default"], "scaling", 9.0), ValueError, "scaling 9"),
        (lambda m: own_adapter(base=m).layers[1].q_proj.lora_B["default"].data[0, 0].fill_(float("nan")), ValueError, LOST),
    ],
    ids=["pissa", "no adapter", "another adapter", "scaling", "diverged"],
)
def test_what_the_format_cannot_say_is_not_written(tmp_path, change, error, message):
    ours = model()
    change(ours)
    with pytest.raises(error, match=message):
        save_adapter(ours, tmp_path / "new")
    assert not (tmp_path / "new").exists()
