"""Tiny mixtures of experts with random weights for the tests, where those compute: whole models by name, also under PEFT, and
one layer's experts with the factors of two adapters.
"""

import copy

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from triton_interpreter import DEVICE

from lora_kernels import lora_parameters
from lora_kernels.layers.experts import experts_forward
from lora_kernels.values import LoRAAdapter

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
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
E, HIDDEN, INNER, TOKENS, TOP_K, RANK = 6, 40, 24, 37, 3, 4


def moe(name):
    """A model whose experts differ and whose biases are not zero; by transformers' loop over experts, which knows float64."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZE, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for path, parameter in model.named_parameters():
        if "experts." in path and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    return model.to(DEVICE)


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


def losses_of(model, steps):
    """Of each step of a training of its adapters."""
    optimizer, losses = torch.optim.Adam(lora_parameters(model), lr=0.03), []
    for _ in range(steps):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return losses


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation allocates, but for views and what is there already."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.numel() and t.untyped_storage().data_ptr() not in self.known:
                there = t.untyped_storage().nbytes() // t.element_size()  # memory that calls share may be larger than t
                self.elements = max(self.elements, min(t.numel(), there))
        return result


def layer(dtype, activation="silu", E=E):
    config = transformers.Qwen3MoeConfig(num_experts=E, hidden_size=HIDDEN, moe_intermediate_size=INNER, hidden_act=activation)
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    module = Qwen3MoeExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.to(DEVICE, dtype)


def drawn(dtype):
    """(x, ids, weights, dy, A and B of the first stack, of the second)."""
    torch.manual_seed(2)
    x, weights, dy = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K).softmax(-1), torch.randn(TOKENS, HIDDEN)
    ids = torch.rand(TOKENS, E - 1).topk(TOP_K).indices  # none for the last expert
    shapes = (E, RANK, HIDDEN), (E, 2 * INNER, RANK), (E, RANK, INNER), (E, HIDDEN, RANK)
    factors = [torch.randn(shape) * 0.2 for shape in shapes]
    x, weights, dy, *factors = [t.to(DEVICE, dtype) for t in (x, weights, dy, *factors)]
    return [x, ids.to(DEVICE), weights, dy, *factors]


def results(module, tensors, compute):
    """y and the gradients of tokens, router weights and factors."""
    x, ids, weights, dy, *factors = tensors
    wanted = [t.detach().requires_grad_() for t in (x, weights, *factors)]
    y = compute(module, wanted[0], ids, wanted[1], *wanted[2:])
    names = ("x", "weights", "A1", "B1", "A2", "B2")
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, wanted, dy), strict=True))}


def fast(module, x, ids, weights, A1, B1, A2, B2):
    adapters = {"gate_up_proj": LoRAAdapter(A1, B1, 1.5), "down_proj": LoRAAdapter(A2, B2, 0.5)}
    return experts_forward(module, x, ids, weights, adapters)


def by_sums(module, x, ids, weights, A1, B1, A2, B2):
    """transformers' own loop over experts, of weights with s·B·A in them."""
    own = {"gate_up_proj": module.gate_up_proj + 1.5 * B1 @ A1, "down_proj": module.down_proj + 0.5 * B2 @ A2}
    return torch.func.functional_call(module, own, (x, ids, weights))
