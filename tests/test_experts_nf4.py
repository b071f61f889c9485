"""Experts' stacks that add_lora(quantize="nf4") puts into 4 bits: numbers, states, memory, refusals."""

import copy
import io

import pytest
import torch
from accuracy import nan_in_fresh_memory
from experts_case import IDS, MODELS, Largest, by_sums, drawn, fast, in_double, layer, losses_of, moe, results, run, stacks
from safetensors.torch import load_file
from torch import nn

from lora_kernels import LoRAConfig, add_lora, merge_lora, quantize_nf4, remove_lora, save_merged, unmerge_lora, use_backend
from lora_kernels.backends.torch import grouped_linear, segments
from lora_kernels.cases.rule import violations
from lora_kernels.layers.experts import weight_names
from lora_kernels.layers.experts_4bit import why_not_4_bit
from lora_kernels.layers.lora_experts import LoRAStack, Planned
from lora_kernels.segments import Segments

NAMES = ("Mixtral", "Qwen3Moe", "DeepseekV3", "NemotronH")
BESIDE = {"", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"}


def layer_4bit(dtype, activation="silu"):
    """One layer's experts in 4 bits, and the same with their dequantised weights."""
    module, dense = layer(dtype, activation), layer(dtype, activation)
    for name in weight_names(module):
        planned = Planned(module, name)
        planned.put(planned.make("nf4"))
        getattr(dense, name).data = module.get_submodule(name).matrix.dequantize()
    return module, dense


def broken(dtype=torch.float32, activation="silu"):
    (module, dense), tensors = layer_4bit(dtype, activation), drawn(dtype)
    with nan_in_fresh_memory():
        tested = results(module, tensors, fast)
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    exact = results(in_double(dense), wide, by_sums)
    return violations(tested, results(dense, tensors, by_sums), exact, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer(dtype, activation):
    assert not broken(dtype, activation)


def test_another_expert_s_codes_break_the_rule(monkeypatch):
    of = segments.weight_of
    monkeypatch.setattr(segments, "weight_of", lambda W, e: of(W, (e + 1) % len(torch.empty(W.shape[0]))))
    with use_backend("torch"):  # a CPU's own takes W_e apart in its own way
        assert broken()


def adapted(name, quantize="nf4", **options):
    model = moe(name)
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, "target_parameters": stacks(model), **options})
    report = add_lora(model, config, quantize=quantize)
    torch.manual_seed(3)
    for path, parameter in model.named_parameters():
        if ".lora_" in path:
            nn.init.normal_(parameter, std=0.3)
    return model, report


def stacks_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRAStack)}


def dense_of(model, name):
    """The same model with dequantised stacks."""
    dense, _ = adapted(name, None)
    for stack, other in zip(stacks_of(model).values(), stacks_of(dense).values(), strict=True):
        other.weight.data = stack.matrix.dequantize()
    return dense


def logits(model):
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model(name):
    """Outputs and gradients of the dequantised weights in float64, and one pass over the codes as quantize_nf4 makes them."""
    model, report = adapted(name)
    assert not report.left_dense
    plain = dict(moe(name).named_parameters())
    for path, stack in stacks_of(model).items():
        assert torch.equal(stack.matrix.codes, quantize_nf4(plain[path].detach()).codes)
        assert "nf4 of torch.float32 in blocks of 64" in repr(stack)
    exact, tested = run(in_double(dense_of(model, name))), run(model)
    for path, value in exact.items():
        assert (tested[path] - value).abs().max() <= 2e-5 * value.abs().max() + 1e-7, path


def test_a_gpu_s_kernels_ask_the_host_for_no_number_of_rows(monkeypatch):
    made = Segments.from_ids
    monkeypatch.setattr(Segments, "from_ids", lambda ids, count: made(ids, count)._replace(host=None))
    for name in ("ends", "segments"):
        monkeypatch.setattr(grouped_linear, name, None)
    with use_backend("triton"):
        assert not broken()
    with use_backend("torch"), pytest.raises(TypeError, match="not callable"):
        broken()


def test_no_stack_of_weights_is_formed(monkeypatch):
    monkeypatch.setitem(MODELS, "Qwen3Moe", {**MODELS["Qwen3Moe"], "num_experts": 32})
    model, _ = adapted("Qwen3Moe", r=2)
    smallest = min(stack.matrix.numel() for stack in stacks_of(model).values())
    with Largest(model) as mode:
        run(model, IDS[:, :4])
    assert mode.elements < 0.5 * smallest
    with Largest(model) as mode:
        next(iter(stacks_of(model).values())).matrix.dequantize()
    assert mode.elements >= smallest, "the measure sees one"


@pytest.mark.parametrize("assign", [False, True])
def test_states(assign):
    """Codes under the stack's name, what they mean beside them; into 4-bit layers and dense ones; dense ones into 4 bits."""
    model, _ = adapted("Mixtral")
    state, expected = model.state_dict(), logits(model)
    path = "model.layers.0.mlp.experts.down_proj"
    assert {key.removeprefix(path) for key in state if key.startswith(path) and ".lora_" not in key} == BESIDE
    for quantize in ("nf4", None):
        other, _ = adapted("Mixtral", quantize)
        for stack in stacks_of(other).values():
            nn.init.normal_(stack.lora_A["default"])
        other.load_state_dict(copy.deepcopy(state), assign=assign)
        assert torch.equal(logits(other), expected)
    dense, _ = adapted("Mixtral", None)
    model.load_state_dict(dense.state_dict(), assign=assign)
    assert torch.equal(logits(model), expected), "quantised again"


def test_states_that_do_not_fit():
    model, _ = adapted("Mixtral")
    path, other = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"
    state, before = model.state_dict(), logits(model)
    wrong = {key.replace(other, "other").replace(path, other).replace("other", path): value for key, value in state.items()}
    with pytest.raises(ValueError, match=r"a 4-bit weight of shape \(4, 32, 24\), expected \(4, 48, 32\)"):
        model.load_state_dict(wrong)
    with pytest.raises(ValueError, match=r"the 4-bit state lacks \['absmax'\]"):
        model.load_state_dict({key: value for key, value in state.items() if key != f"{path}.absmax"})
    transposed, _ = adapted("GptOss")
    stack = stacks_of(transposed)[path]
    w = quantize_nf4(stack.matrix.contiguous())
    assert why_not_4_bit(False, w.shape) is None
    stack._hold(w)
    state = transposed.state_dict()
    with pytest.raises(ValueError, match=r"a 4-bit stack \(4, 32, 24\), expected a dense one: its experts are \[in, out\]"):
        adapted("GptOss")[0].load_state_dict(state)
    merge_lora(model)
    with pytest.raises(RuntimeError, match="cannot load a state dict"):
        model.load_state_dict({path: torch.zeros(4, 32, 24)}, strict=False)
    unmerge_lora(model)
    assert torch.equal(logits(model), before)


def test_what_stays_dense(monkeypatch):
    """Transposed experts, and ones that end inside a block; the report says why."""
    model, report = adapted("GptOss")
    assert not any(stack.quantized for stack in stacks_of(model).values())
    reason = "a stack of experts: its experts are [in, out], and in 4 bits only [out, in] can be multiplied by"
    assert set(report.left_dense.values()) == {reason}
    assert len(report.left_dense) == 4
    monkeypatch.setitem(MODELS, "Mixtral", {"num_local_experts": 4, "intermediate_size": 23})
    model, report = adapted("Mixtral")
    assert set(report.left_dense) == {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("down_proj",)}
    assert "blocks of 64 run over the ends of its experts of 32·23" in str(report)


def test_merged_and_removed(tmp_path):
    model, _ = adapted("Mixtral")
    model.eval()
    dense, before = dense_of(model, "Mixtral").eval(), logits(model)
    save_merged(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    merge_lora(dense)
    expected = {path: stack.weight for path, stack in stacks_of(dense).items()}
    assert all(torch.allclose(saved[path], value.cpu(), atol=1e-6) for path, value in expected.items())
    errors = merge_lora(model)
    for path, stack in stacks_of(model).items():
        difference = (stack.matrix.dequantize() - expected[path]).norm() / expected[path].norm()
        assert abs(difference - errors[path]) < 1e-5
        assert 0.01 < difference < 0.15, "of quantising again"
    unmerge_lora(model)
    assert torch.equal(logits(model), before)
    remove_lora(model)
    other, _ = adapted("Mixtral")
    for path, stack in stacks_of(other).items():
        parameter = model.get_parameter(path)
        assert torch.equal(parameter, stack.matrix.dequantize())
        assert parameter.requires_grad, "as before add_lora"


def test_copies_pickles_and_moves():
    model, _ = adapted("Mixtral")
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model.model.layers[0].mlp.experts, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert torch.equal(read.down_proj.matrix.codes, model.model.layers[0].mlp.experts.down_proj.matrix.codes)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    moved = copy.deepcopy(model).bfloat16()
    for stack, other in zip(stacks_of(model).values(), stacks_of(moved).values(), strict=True):
        assert all(torch.equal(t, other.matrix.tensors()[name]) for name, t in stack.matrix.tensors().items())


def test_compiles_as_one_graph(device):
    experts = adapted("Qwen3Moe")[0].eval().model.layers[0].mlp.experts
    call = [t.to(device) for t in (torch.randn(6, 32), torch.rand(6, 8).topk(3).indices, torch.rand(6, 3))]
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*call), experts(*call))


def test_it_trains():
    """With layers in 4 bits beside it, and recomputation."""
    model, report = adapted("Qwen2Moe", lora_dropout=0.1, target_modules=["q_proj"])
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert not report.left_dense
    losses = losses_of(model, steps=8)
    assert losses[-1] < losses[0] - 0.2


def test_transformers_files_cannot_hold_them(tmp_path):
    model, _ = adapted("Mixtral")
    with pytest.raises(ValueError, match=r"gate_up_proj: a stack of experts in 4 bits, which transformers cannot read"):
        model.save_pretrained(tmp_path)
    merge_lora(model.eval())
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(type(model).from_pretrained(tmp_path).to(model.device)), logits(model), atol=1e-5)
