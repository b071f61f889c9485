"""Accelerated PEFT layers over bitsandbytes' Linear4bit: the same bytes, PEFT's results, and its way to prepare a model."""

import copy
import pickle

import pytest
import torch
from accuracy import violations
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft_model import FAST
from torch import nn

from lora_kernels import NF4Weight, accelerate, accelerated, restore
from lora_kernels.layers.linear_4bit import nf4_weight

bnb = pytest.importorskip("bitsandbytes")
BF16, FP32 = torch.bfloat16, torch.float32


def adapted(dtype=BF16, *, loaded_in_4bit=True, config=None, **options):
    """A PeftModel of one quantised layer; options: of Linear4bit."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 96, compute_dtype=dtype, **{"quant_type": "nf4", **options})
    base = nn.Sequential(layer).to("cpu")  # quantises
    base.is_loaded_in_4bit = loaded_in_4bit
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False) if config is None else config
    return get_peft_model(base, config)


def layer(model):
    return model.base_model.model[0]


def run(model, x, dy):
    x = x.detach().requires_grad_()
    y = model(x)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype))
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def dense(model, dtype, weight_dtype):
    """The same PeftModel over the dequantised weight, as the layer reads it at `weight_dtype`."""
    W, source = nf4_weight(layer(model).base_layer).dequantize(weight_dtype), layer(model)
    base = nn.Sequential(nn.Linear(64, 96, bias=source.base_layer.bias is not None))
    base[0].weight.data = W.clone()
    if source.base_layer.bias is not None:
        base[0].bias.data = source.base_layer.bias.data.to(weight_dtype)
    twin = get_peft_model(base, LoraConfig(target_modules=["0"], r=4, use_dora=source.use_dora["default"]))
    layer(twin).load_state_dict({k: v for k, v in source.state_dict().items() if "lora_" in k}, strict=False)
    return twin.to(dtype)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    "options", [{}, {"compress_statistics": False}, {"bias": False}, {"quant_type": "fp4"}, {"quant_storage": BF16}], ids=str
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_results_by_the_one_rule(dtype, options, use_dora):
    plain = adapted(dtype, config=LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, use_dora=use_dora), **options)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    x, dy = torch.randn(5, 3, 64).to(dtype), torch.randn(5, 3, 96).to(dtype)
    tested, theirs = run(ours, x, dy), run(plain, x, dy)
    reference = run(dense(plain, dtype, dtype), x, dy)
    exact = run(dense(plain, torch.float64, dtype), x.double(), dy.double())
    assert report.calls() == {FAST: 1}
    assert {name: t.dtype for name, t in tested.items()} == {name: t.dtype for name, t in theirs.items()}
    broken = violations(tested, reference, exact, dtype)
    assert not broken, broken


def test_the_bytes_are_shared_and_the_state_dict_stays():
    model = adapted()
    keys = list(model.state_dict())
    before = layer(model).base_layer.weight
    accelerate(model)
    model(torch.randn(2, 64).bfloat16())
    assert isinstance(nf4_weight(layer(model).base_layer), NF4Weight)
    assert nf4_weight(layer(model).base_layer).codes.data_ptr() == before.data_ptr()
    assert layer(model).base_layer.weight is before
    assert list(model.state_dict()) == keys
    assert repr(layer(model)).startswith("lora.Linear4bit(")


@pytest.mark.parametrize("autocast", [BF16, torch.float16])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_dtypes_under_autocast_are_peft_s(autocast, dtype):
    plain = adapted(dtype)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    x = torch.randn(2, 64).to(dtype)
    with torch.autocast("cpu", autocast):
        a, b = plain(x), ours(x)
    assert a.dtype == b.dtype
    torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05)
    assert report.calls() == {FAST: 1}


@pytest.mark.parametrize("loaded_in_4bit", [True, False])
def test_dora_s_dtype_under_a_gpu_s_autocast_is_peft_s(loaded_in_4bit):
    config = LoraConfig(target_modules=["0"], r=4, init_lora_weights=False, use_dora=True)
    plain = adapted(BF16, config=config, loaded_in_4bit=loaded_in_4bit)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    with torch.autocast("cpu", BF16):
        torch.set_autocast_enabled("cuda", True)  # what PEFT asks for, on a CPU too
        try:
            for dtype in (BF16, FP32):
                x = torch.randn(2, 64).to(dtype)
                a, b = plain(x), ours(x)
                assert (a.dtype, isinstance(layer(ours).projection(x), str)) == (b.dtype, loaded_in_4bit and dtype == BF16)
                torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert report.calls() == {FAST: 2}


def test_without_peft_s_flag_its_dense_layer_over_a_linear4bit_is_fast_too():
    model = adapted(loaded_in_4bit=False)
    report = accelerate(model)
    assert type(layer(model)).__name__ == "AcceleratedLinear"
    model(torch.randn(2, 64).bfloat16())
    assert report.calls() == {FAST: 1}


def test_created_accelerated_and_restored_and_copied():
    model = adapted(config=accelerated(LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)))
    x = torch.randn(2, 64).bfloat16()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert accelerate(model).calls() == {FAST: 1}
    restore(model)
    torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


def test_merging_is_peft_s_own():
    plain = adapted(FP32)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    x = torch.randn(2, 64)
    for model in (plain, ours):
        model.merge_adapter()
    assert torch.equal(ours(x), plain(x))
    assert report.calls() == {FAST: 0, "adapters are merged": 1}
    for model in (plain, ours):
        model.unmerge_adapter()
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)


def test_x_wider_than_the_compute_dtype_is_not_rounded_to_it():
    """bitsandbytes computes in bf16 here and PEFT its adapter in float32; everything in float32 is nearer to the truth."""
    plain = adapted(BF16)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    x, dy = torch.randn(5, 64), torch.randn(5, 96)
    tested, theirs = run(ours, x, dy), run(plain, x, dy)
    exact = run(dense(plain, torch.float64, FP32), x.double(), dy.double())
    assert report.calls() == {FAST: 1}
    assert {name: t.dtype for name, t in tested.items()} == {name: t.dtype for name, t in theirs.items()}
    assert not violations(tested, theirs, exact, FP32)


def test_x_narrower_than_the_compute_dtype_falls_back():
    model = adapted(FP32)
    report = accelerate(model)
    model(torch.randn(2, 64).bfloat16())
    assert report.calls() == {FAST: 0, "the 4-bit layer's compute_dtype is not x's dtype": 1}


def test_a_weight_that_is_not_quantised_falls_back():
    model = adapted()
    report = accelerate(model)
    layer(model).base_layer.weight.quant_state = layer(model).base_layer.quant_state = None
    with pytest.raises(ValueError, match="quant_state"):
        model(torch.randn(2, 64).bfloat16())
    assert any("not quantised" in reason for reason in report.calls())


def test_a_prepared_model_trains_as_with_peft():
    import tiny_models

    def make():
        torch.manual_seed(0)
        # sizes that are multiples of the block: for others bitsandbytes' own CPU kernel reads a wrong absmax on AVX512
        model = tiny_models.llama(hidden_size=64, intermediate_size=128)
        for block in model.model.layers:
            for owner, name in ((block.self_attn, "q_proj"), (block.self_attn, "v_proj"), (block.mlp, "down_proj")):
                dense_layer = getattr(owner, name)
                quantised = bnb.nn.Linear4bit(dense_layer.in_features, dense_layer.out_features, bias=False, compute_dtype=FP32)
                quantised.load_state_dict(dense_layer.state_dict())
                setattr(owner, name, quantised)
        model = model.to("cpu")
        model.is_loaded_in_4bit = True
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(model, config).train()

    plain, ours = make(), make()
    report = accelerate(ours)
    batch, curves = tiny_models.causal_batch(), []
    for model in (plain, ours):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(4):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)
    assert report.calls().keys() == {FAST}


def test_torch_compile_in_one_graph():
    model = adapted()
    accelerate(model)
    x = torch.randn(4, 64).bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, model(x))
    assert layer(model).lora_B["default"].weight.grad.abs().sum() > 0
