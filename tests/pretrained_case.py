"""A small transformers model over every kind of base, adapted, and what of it a reader must find again."""

import copy

import pytest
import tiny_models
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora

bnb = pytest.importorskip("bitsandbytes")
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

TARGETS = {"target_modules": ["q_proj", "down_proj"]}


def llama(tmp_path, **options):
    """A model of 64 features in bf16, as from_pretrained gives it with `options`."""
    if not (tmp_path / "base").exists():
        torch.manual_seed(3)
        tiny_models.llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options).train()  # in evaluation bitsandbytes repacks


def in_4_bits(**options):
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)


BASES = {  # how the model is loaded; what add_lora is told
    "dense": ({}, None),
    "nf4": ({}, "nf4"),
    "bnb": ({"quantization_config": in_4_bits(bnb_4bit_quant_type="nf4")}, None),
    "bnb-fp4-nested": ({"quantization_config": in_4_bits(bnb_4bit_use_double_quant=True)}, None),
    "bnb-storage": ({"quantization_config": in_4_bits(bnb_4bit_quant_storage="bfloat16")}, None),
    "bnb-head-nf4": ({"quantization_config": in_4_bits(bnb_4bit_quant_type="nf4")}, "nf4"),
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35], [8, 9, 7, 9, 3, 2, 38]])


def adapted(tmp_path, base, **config):
    options, quantize = BASES[base]
    model = llama(tmp_path, **options)
    targets = {"target_modules": ["lm_head", "q_proj"]} if base == "bnb-head-nf4" else TARGETS
    add_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **targets, **config}), quantize=quantize)
    return model


def same_bytes(a, b):
    """Codes that are stored as floats may be NaN."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def same_states(model, state):
    return all(same_bytes(tensor, state[name]) for name, tensor in model.state_dict().items())


def again(directory, **options):
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(report.values()), "every key is read, and none is missing"
    return model.train()


def linears(model):
    """Type and bytes of every linear layer; a LoRA layer stands for the layer that it was made from."""
    copied = copy.deepcopy(model)
    found = {}
    for path, module in copied.named_modules():
        if hasattr(module, "to_linear"):
            packed, state = module.quantized, module
        elif isinstance(module, nn.Linear):
            packed, state = isinstance(module, bnb.nn.Linear4bit), module
        else:
            continue
        tensors = {name: t for name, t in state.state_dict().items() if not name.startswith("lora_")}
        codes = tensors.pop("weight")
        found[path] = packed, codes.view(torch.uint8).flatten(), tensors
    return found


def same_linears(a, b):
    assert a.keys() == b.keys()
    for path, (packed, codes, beside) in a.items():
        assert packed == b[path][0], path
        assert torch.equal(codes, b[path][1]), path
        assert beside.keys() == b[path][2].keys()
        for name, tensor in beside.items():
            if "bitsandbytes__" not in name:  # JSON, whose spaces are each writer's own
                assert torch.equal(tensor, b[path][2][name]), f"{path}.{name}"
