"""LoRALinear and add_lora over 4-bit weights: bitsandbytes' layers and keys, moving, merging, a transformers model."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    quantize_nf4,
    remove_lora,
    set_adapter,
    unmerge_lora,
)
from lora_kernels.nf4.weight import NF4Weight

bnb = pytest.importorskip("bitsandbytes")
K, N = 128, 96


def layer4(dtype=torch.float32, r=4, bias=True, blocksize=64, double_quant=True, **adapter):
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    options = {"init_lora_weights": False, **adapter}
    return LoRALinear.from_linear(linear, quantize="nf4", r=r, blocksize=blocksize, double_quant=double_quant, **options)


def linear4bit(dtype=torch.float32, storage=torch.uint8, quant_type="nf4", double_quant=True, **options):
    layer = bnb.nn.Linear4bit(
        K, N, quant_storage=storage, quant_type=quant_type, compress_statistics=double_quant, **options
    ).to(dtype)
    return layer.to("cpu").train()  # in evaluation it repacks itself on some CPUs


def expected_y(layer, x):
    """The layer's equation with the dense weight."""
    W, name = layer.matrix.dequantize(x.dtype), layer.active_adapter
    y = nn.functional.linear(x, W, layer.bias.to(x.dtype))
    return y if name is None else y + layer.adapters[name].scaling * (x @ layer.lora_A[name].T @ layer.lora_B[name].T)


def test_from_linear():
    linear = nn.Linear(K, N).eval()
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(1))
    layer = LoRALinear.from_linear(linear, quantize="nf4", r=4, init_lora_weights=False)
    w = quantize_nf4(linear.weight.detach())
    assert torch.equal(layer.weight.view(-1), w.codes)
    assert torch.equal(layer.matrix.dequantize(), w.dequantize())
    assert not layer.training
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), expected_y(layer, x))
    assert seen == [1]
    assert "nf4 of torch.float32 in blocks of 64" in repr(layer)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A.default", "lora_B.default"]


def test_the_dense_weight_is_not_kept_alive():
    import gc
    import weakref

    linear = nn.Linear(K, N)
    weight = weakref.ref(linear.weight)
    layer = LoRALinear.from_linear(linear, quantize="nf4")
    del linear
    gc.collect()
    assert weight() is None
    assert layer.to_linear().weight.shape == (N, K)


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(N, K)
    layer = LoRALinear.from_linear(conv, quantize="nf4", r=4, init_lora_weights=False)
    assert layer.matrix.shape == (N, K)
    assert torch.equal(layer.matrix.codes, quantize_nf4(conv.weight.detach().T).codes)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), expected_y(layer, x))
    plain = layer.to_linear()
    assert type(plain) is Conv1D
    layer.set_adapter(None)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_linear4bit_shares_its_bytes(storage, double_quant, quant_type):
    linear = linear4bit(storage=storage, double_quant=double_quant, quant_type=quant_type)
    x = torch.randn(3, K)
    expected = linear(x)
    layer = LoRALinear.from_linear(linear, r=4)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert layer._weight_absmax.data_ptr() == linear.weight.quant_state.absmax.data_ptr()
    torch.testing.assert_close(layer(x), expected)
    layer.set_adapter(None)
    torch.testing.assert_close(layer(x), expected)
    again = layer.to_linear()
    assert type(again) is type(linear)
    assert again.weight.data_ptr() == linear.weight.data_ptr()
    assert again.weight.dtype == storage
    assert torch.equal(again(x), expected)


@pytest.mark.filterwarnings("ignore:bitsandbytes repacked")
def test_linear4bit_that_was_evaluated():
    """On a CPU with AVX512-bf16 instructions it has repacked its weight by then; the values it computes with are taken over."""
    linear = linear4bit(torch.bfloat16, compute_dtype=torch.bfloat16).eval()
    x = torch.randn(3, K, dtype=torch.bfloat16)
    expected = linear(x)
    repacked = getattr(linear.weight.quant_state, "packing_format_for_cpu", False)
    layer = LoRALinear.from_linear(linear, r=4)
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.to_linear().train()(x), expected, rtol=2e-2, atol=2e-2)
    assert (layer.weight.data_ptr() != linear.weight.data_ptr()) == repacked


def test_compute_dtype():
    linear = linear4bit(torch.bfloat16, compute_dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, r=4)
    x = torch.randn(3, K)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    wide = LoRALinear.from_linear(linear4bit(torch.bfloat16, compute_dtype=torch.float32), r=4)
    assert wide(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_casting_and_copying(dtype):
    layer = layer4(dtype)
    W = layer.matrix.dequantize()
    x = torch.randn(3, K)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).half().float(),
        copy.deepcopy(layer).double(),
        copy.deepcopy(layer).to("cpu"),
        copy.deepcopy(layer).share_memory(),
    ):
        assert torch.equal(other.matrix.dequantize(), W)
        assert other.matrix.dtype == dtype
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert other(x.to(other.lora_A["default"].dtype)).shape == (3, N)
    assert layer.to("meta").matrix.device.type == "meta"
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer.to_empty(device="cpu")
    layer.matrix.check()


def test_merged_layers_move_with_what_unmerge_restores():
    layer = layer4()
    codes = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, codes)
    layer.matrix.check()


# ---- state dicts ----


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_of_bitsandbytes_loads(double_quant, storage):
    linear = linear4bit(double_quant=double_quant, storage=storage)
    state = linear.state_dict()
    for layer in (layer4(double_quant=not double_quant, blocksize=128), LoRALinear(K, N)):  # another format, and a dense layer
        result = layer.load_state_dict(state, strict=False)
        assert result.unexpected_keys == []
        assert sorted(result.missing_keys) == ["lora_A.default", "lora_B.default"]
        assert torch.equal(layer.matrix.dequantize(), NF4Weight.from_bnb(linear.weight).dequantize())
        assert torch.equal(layer.bias, linear.bias)
        assert layer.weight.data_ptr() != linear.weight.data_ptr()
        written = layer.state_dict()
        for name, value in state.items():
            assert written[name].dtype == value.dtype
            assert torch.equal(written[name].view(torch.uint8), value.view(torch.uint8)), name


def test_state_dict_is_read_by_bitsandbytes():
    layer = layer4(torch.bfloat16)
    state = {name.removeprefix("weight."): t for name, t in layer.state_dict().items() if name.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(layer.state_dict()["weight"], state, device="cpu")
    assert torch.equal(bnb.functional.dequantize_4bit(weight, weight.quant_state), layer.matrix.dequantize())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip_through_a_file(assign):
    layer, other = layer4(torch.bfloat16, bias=False), layer4(torch.bfloat16, bias=False)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file), assign=assign)
    x = torch.randn(3, K, dtype=torch.bfloat16)
    assert torch.equal(layer(x), other(x))


def test_loading_into_a_layer_on_the_meta_device():
    layer = layer4()
    with torch.device("meta"):
        empty = LoRALinear.from_linear(nn.Linear(K, N), quantize="nf4", r=4)
    assert empty.state_dict().keys() == layer.state_dict().keys()
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, K)
    assert torch.equal(layer(x), empty(x))


def test_a_dense_state_is_quantised():
    linear, layer = nn.Linear(K, N), layer4()
    layer.load_state_dict(linear.state_dict(), strict=False)
    assert torch.equal(layer.matrix.dequantize(), quantize_nf4(linear.weight.detach()).dequantize())


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("weight.absmax"),
        lambda s: s.pop("weight.quant_state.bitsandbytes__nf4"),
        lambda s: s.update(weight=s["weight"][:-1]),
        lambda s: s.update({"weight.absmax": s["weight.absmax"][:-1]}),
        lambda s: s.update({"weight.more": torch.ones(1)}),
        lambda s: s.update({k: v for k, v in quantized_state(64, 64).items() if k.startswith("weight")}),
        lambda s: [s.pop(name) for name in list(s) if name.startswith("weight.")],
    ],
)
def test_corrupt_states_change_nothing(damage):
    layer = layer4()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    state = {name: t.clone() for name, t in layer4().state_dict().items()}
    damage(state)
    with pytest.raises(ValueError, match="weight"):
        layer.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def quantized_state(K, N):
    return LoRALinear.from_linear(nn.Linear(K, N), quantize="nf4").state_dict()


@pytest.mark.parametrize("position", [0, 1])
def test_a_corrupt_state_of_a_model_changes_no_layer(position):
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K), nn.LayerNorm(K))
    add_lora(model, LoRAConfig(r=2, target_modules=["0", "1"]), quantize="nf4")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t + 1 if t.is_floating_point() else t.clone() for name, t in before.items()}
    state[f"{position}.weight.absmax"] = state[f"{position}.weight.absmax"][1:]
    with pytest.raises(ValueError, match=rf"{position}\.weight: absmax"):
        model.load_state_dict(state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=rf"{position}\.weight: absmax"):
            other.load_state_dict(state)
        other.load_state_dict(before)
        remove_lora(other)
        assert not other._load_state_dict_pre_hooks
    assert model._load_state_dict_pre_hooks


# ---- merging, initialisation, removal ----


@pytest.mark.parametrize("double_quant", [False, True])
def test_merge_and_unmerge(double_quant):
    layer = layer4(torch.bfloat16, double_quant=double_quant).eval()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    W, A, B = layer.matrix.dequantize(torch.float32), layer.lora_A["default"].float(), layer.lora_B["default"].float()
    wanted = W + layer.adapters["default"].scaling * (B @ A)
    error = layer.merge()
    assert layer.merged
    merged = layer.matrix.dequantize(torch.float32)
    assert error == pytest.approx(((merged - wanted).norm() / wanted.norm()).item(), rel=1e-3)
    assert 0 < error < 0.2
    assert layer.matrix.dtype == torch.bfloat16
    x = torch.randn(3, K, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.matrix.dequantize(), layer.bias))
    with pytest.raises(RuntimeError, match="merge again"):
        layer.merge()
    layer.unmerge()
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_merge_of_an_adapter_of_zeros_is_nearly_nothing():
    """W is a point of the format; quantised again it stays one, up to absmax's rounding."""
    layer = layer4(torch.float32, double_quant=False, init_lora_weights=True)
    assert layer.merge() < 1e-7


def test_initialisations_that_rewrite_the_weight_are_refused():
    with pytest.raises(ValueError, match="init_lora_weights: got 'pissa' for a 4-bit weight"):
        layer4(init_lora_weights="pissa")
    model = nn.Sequential(nn.Linear(K, N))
    weight = model[0].weight
    with pytest.raises(ValueError, match="4-bit"):
        add_lora(model, LoRAConfig(r=2, init_lora_weights="olora", target_modules=["0"]), quantize="nf4")
    assert model[0].weight is weight
    assert weight.requires_grad


def test_reset_parameters():
    layer = layer4()
    codes, A = layer.weight.clone(), layer.lora_A["default"].clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, codes)
    assert not torch.equal(layer.lora_A["default"], A)
    layer.matrix.check()


def test_quantize_names():
    with pytest.raises(ValueError, match="quantize: got 'int8', expected None or 'nf4'"):
        LoRALinear.from_linear(nn.Linear(K, N), quantize="int8")
    with pytest.raises(ValueError, match="quantize: got 'fp4'"):
        add_lora(nn.Sequential(nn.Linear(K, N)), LoRAConfig(), quantize="fp4")


def mlp(dtype=torch.bfloat16):
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).to(dtype)


def test_add_switch_merge_remove():
    model = mlp()
    dense = copy.deepcopy(model)
    report = add_lora(model, LoRAConfig(r=4, target_modules=["0", "2"]), quantize="nf4")
    assert report.total == sum(p.numel() for p in model.parameters() if p.dtype != torch.uint8) + 2 * K * N
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))
    add_lora(model, LoRAConfig(r=2, target_modules=["2"]), "second")
    x = torch.randn(5, K, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_()
    set_adapter(model, None)
    base = model(x)
    set_adapter(model, "default")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    errors = merge_lora(model.eval())
    assert sorted(errors) == ["0", "2"]
    assert all(0 < error < 0.2 for error in errors.values())
    unmerge_lora(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    remove_lora(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), base)
    assert torch.equal(model[0].weight, quantize_nf4(dense[0].weight.detach()).dequantize())
    assert model[0].weight.requires_grad


def test_unquantised_linear4bit_is_left_alone_with_a_reason():
    model = nn.Sequential(bnb.nn.Linear4bit(K, N), linear4bit())
    report = add_lora(model, LoRAConfig(r=2, target_modules=["0", "1"]))
    assert "not quantised yet" in report.skipped["0"]
    assert list(report.adapted) == ["1"]


def test_training_changes_the_adapters_alone():
    model = mlp(torch.float32)
    add_lora(model, LoRAConfig(r=8, lora_dropout=0.1, target_modules=["0", "2"]), quantize="nf4")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    x = torch.randn(64, K)
    losses = []
    for _ in range(30):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(lora_state_dict(model))


def test_compiled_layer():
    torch._dynamo.reset()
    layer = layer4(torch.bfloat16)
    x = torch.randn(5, K, dtype=torch.bfloat16, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    y.sum().backward()
    torch.testing.assert_close(y, layer(x))
    assert x.grad is not None


# ---- transformers ----


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
def test_a_transformers_model_loaded_in_4_bit(tmp_path, storage):
    """Converted in place, trained a few steps, saved, read back by transformers without this package."""
    import tiny_llama
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama.write(tmp_path / "base", hidden=64)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    options = {"device_map": "cpu", "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, **options).train()
    ids = torch.randint(0, 200, (2, 12))
    base = model(ids).logits
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    report = add_lora(model, LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    assert len(report.adapted) == 14
    assert {name: p.data_ptr() for name, p in model.named_parameters() if name in pointers} == pointers
    assert torch.equal(model(ids).logits, base)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    set_adapter(model, None)
    assert torch.equal(model(ids).logits, base)
    remove_lora(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **options).train()
    assert torch.equal(again(ids).logits, base)
