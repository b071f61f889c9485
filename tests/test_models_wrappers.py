"""Models inside wrappers, whole or in parts: every function reads and writes the plain model's names."""

import copy
import json

import pytest
import tiny_models
import torch
from model_case import QV, TOKENS, Model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    load_adapter,
    load_lora_state_dict,
    lora_parameters,
    lora_plus_param_groups,
    lora_state_dict,
    merge_lora,
    remove_lora,
    save_adapter,
    save_merged,
    set_adapter,
    unmerge_lora,
)
from lora_kernels.models import wrappers
from lora_kernels.models.export import merged_tensors

CONFIG = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


@pytest.fixture
def processes():
    """A process group in which this process is the first of two, and nothing is sent."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def fsdp1(model, strategy="NO_SHARD"):
    strategy = torch.distributed.fsdp.ShardingStrategy[strategy]
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), sharding_strategy=strategy)


def in_place(model):
    model.compile(backend="eager")
    return model


def layers(wrap):
    def wrapped(model):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return wrapped


def linears(wrap):
    def wrapped(model):
        for layer in model.model.layers:
            layer.self_attn.q_proj, layer.mlp.up_proj = wrap(layer.self_attn.q_proj), wrap(layer.mlp.up_proj)
        return model

    return wrapped


LOCAL = {
    "compile": compiled,
    "model.compile": in_place,
    "DataParallel": nn.DataParallel,
    "compiled layers": layers(compiled),
    "checkpointed layers": layers(checkpoint_wrapper),
    "compiled and checkpointed layers": layers(lambda layer: compiled(checkpoint_wrapper(layer))),
    "checkpointed and compiled layers": layers(lambda layer: checkpoint_wrapper(compiled(layer))),
    "compiled linears": linears(compiled),
    "checkpointed linears": linears(checkpoint_wrapper),
    "linears in DataParallel": linears(nn.DataParallel),
    "all of them": lambda model: nn.DataParallel(compiled(layers(checkpoint_wrapper)(linears(compiled)(model)))),
}
WRAPPERS = {
    **LOCAL,
    "DDP": DistributedDataParallel,
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "AveragedModel": AveragedModel,
    "FSDP1": fsdp1,
}


def base():
    torch.manual_seed(0)
    return tiny_models.llama(tie_word_embeddings=False).eval()


def adapted(**options):
    model = base()
    torch.manual_seed(1)
    add_lora(model, LoRAConfig(**CONFIG, **options))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(0, 0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 11)[None]).logits


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_written_is_the_plain_model_s(wrapper, tmp_path, processes):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = adapted(modules_to_save=["norm", "lm_head"])
    expected, state = logits(plain), {name: value.clone() for name, value in lora_state_dict(plain).items()}
    assert (expected - logits(base())).abs().max() > 0.1, "the adapter says something"
    model = WRAPPERS[wrapper](plain)

    found = lora_state_dict(model)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    save_adapter(model, tmp_path / "adapter")
    save_merged(model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["model_type"] == "llama"
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    close(logits(again.eval()), expected)
    close(logits(PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()), expected)
    loaded = base()
    load_adapter(loaded, tmp_path / "adapter")
    close(logits(loaded), expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_read_reaches_the_model(wrapper, tmp_path, processes):
    plain = adapted(modules_to_save=["norm"])
    expected, state = logits(plain), {name: value.clone() for name, value in lora_state_dict(plain).items()}
    save_adapter(plain, tmp_path)
    before = logits(base())
    for load in (lambda model: load_lora_state_dict(model, state), lambda model: load_adapter(model, tmp_path)):
        inner = adapted(modules_to_save=["norm"])
        model = WRAPPERS[wrapper](inner)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.zero_()
        load(model)
        close(logits(model), expected)
        set_adapter(model, None)
        close(logits(model), before)
        set_adapter(model, "default")
        close(logits(model), expected)
        assert sum(len(group["params"]) for group in lora_plus_param_groups(model, 1e-3)) == len(lora_parameters(model))
        if wrapper == "FSDP1":
            for call in (merge_lora, remove_lora):
                with pytest.raises(ValueError, match=r"cannot .* inside FullyShardedDataParallel.*save_merged"):
                    call(model)
            continue
        merge_lora(model)
        close(logits(model), expected)
        unmerge_lora(model)
        remove_lora(model)
        close(logits(model), before)
        assert not [module for module in model.modules() if isinstance(module, LoRALinear)]
        assert list(dict(wrappers.named_parameters(model))) == list(dict(base().named_parameters()))


@pytest.mark.parametrize("wrapper", LOCAL)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_come_into_a_wrapped_model(wrapper, quantize, tmp_path):
    plain = base()
    config = LoRAConfig(**CONFIG, modules_to_save=["norm"], rank_pattern={"layers.1.mlp.down_proj": 3})
    expected = add_lora(plain, config, quantize=quantize)
    model = LOCAL[wrapper](base())
    logits(model)  # a compiled graph of the model as it was
    report = add_lora(model, config, quantize=quantize)
    assert report == expected
    assert list(lora_state_dict(model)) == list(lora_state_dict(plain))
    load_lora_state_dict(model, lora_state_dict(plain))
    close(logits(model), logits(plain))
    save_adapter(plain, tmp_path)
    other = LOCAL[wrapper](base())
    load_adapter(other, tmp_path, quantize=quantize)
    close(logits(other), logits(plain))
    raw = model.state_dict()
    bad = {name: value[:1] if "q_proj" in name and name.endswith(".weight") else value for name, value in raw.items()}
    model.load_state_dict(raw)
    if quantize:
        with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight"):
            model.load_state_dict(bad)


def test_a_wrapped_head_is_left_out_of_all_linear():
    model = base()
    model.lm_head = compiled(model.lm_head)
    assert 'the output head, which "all-linear" leaves out' in add_lora(model, LoRAConfig()).skipped["lm_head"]


@pytest.mark.parametrize("wrapper", ["DDP", "compiled DDP", "FSDP1"])
def test_new_parameters_would_miss_a_parallel_wrapper_s_gradients(wrapper, processes, tmp_path):
    save_adapter(adapted(), tmp_path)
    model = WRAPPERS[wrapper](base())
    names = list(model.state_dict())
    for add in (lambda: add_lora(model, LoRAConfig(**CONFIG)), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(ValueError, match=r"would not synchronise the gradients of new parameters; call add_lora first"):
            add()
    assert list(model.state_dict()) == names


def test_flat_shards_are_refused(processes, tmp_path):
    model = Model()
    add_lora(model, LoRAConfig(r=2, **QV))
    model = fsdp1(model, "FULL_SHARD")
    for call in (lora_state_dict, lambda m: save_adapter(m, tmp_path), lambda m: save_merged(m, tmp_path), lora_parameters):
        with pytest.raises(ValueError, match=r"lora_A.default: got shape .*, expected \(2, 8\).*summon_full_params"):
            call(model)
    assert not list(tmp_path.iterdir())


def test_a_plain_module_named_as_a_wrapper_s_attribute_keeps_its_name():
    model = nn.Sequential()
    model.module = Model()
    add_lora(model, LoRAConfig(r=2, **QV))
    assert all(name.startswith("module.blocks.") for name in lora_state_dict(model))
    assert "module.embed.weight" in dict(merged_tensors(nn.DataParallel(model)))


def test_names_of_a_plain_model_are_torch_s_own():
    model = copy.deepcopy(Model())
    model.again = model.blocks[0]
    model.register_buffer("steps", torch.zeros(()))
    for once in (True, False):
        assert list(wrappers.named_modules(model, once)) == list(model.named_modules(remove_duplicate=once))
        parameters = dict(model.named_parameters(remove_duplicate=once))
        assert dict(wrappers.named_parameters(model, once)).keys() == parameters.keys()
        assert all(tensor is parameters[name] for name, tensor in wrappers.named_parameters(model, once))
        assert list(wrappers.named_buffers(model, once)) == list(model.named_buffers(remove_duplicate=once))
    assert wrappers.plain_state_dict(model).keys() == model.state_dict().keys()
    assert wrappers.submodule(model, "blocks.1.norm") is model.blocks[1].norm
    assert model(TOKENS).shape == (2, 3, 11)
