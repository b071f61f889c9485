"""Tiny mixtures of experts with random weights for the tests: whole models by name, and one layer's experts under PEFT."""

import copy

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

SIZE = {
    **{"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1},
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3},
    "Qwen2Moe": {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 24,
    },
    "DeepseekV3": {
        **{"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2},
        **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "NemotronH": {
        **{"hybrid_override_pattern": "*E", "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "moe_shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    },
}
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))


def moe(name):
    """A model whose experts differ and whose biases are not zero; by transformers' loop over experts, which knows float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for path, parameter in model.named_parameters():
        if "experts." in path and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    return model


def stacks(model):
    """The names of the stacks of experts, without the model's path."""
    return sorted({f"experts.{path.rpartition('.')[2]}" for path, p in model.named_parameters() if p.ndim == 3})


def with_peft(model, names=None, **options):
    """PEFT's LoRA with B that is not zero on the model's stacks, and nothing else."""
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": [], **options},
        target_parameters=stacks(model) if names is None else names,
    )
    model = get_peft_model(model, config)
    for path, parameter in model.named_parameters():
        if ".lora_" in path:  # of the size of the weights' part, so that a mistake shows
            nn.init.normal_(parameter, std=0.3)
    return model


def run(model, ids=IDS):
    """Logits and the gradients of what is trained, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logits = model(input_ids=ids).logits
    grads = torch.autograd.grad(logits.square().mean() * 100, list(trained.values()))
    return {"logits": logits.detach(), **dict(zip(trained, grads, strict=True))}


def in_double(model):
    return copy.deepcopy(model).double()
