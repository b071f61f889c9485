"""Experts with LoRA on this machine: accelerate beside PEFT's target_parameters, forward and backward.

    PYTHONPATH=. python bench/experts.py [--repeats N] [--json FILE]

A whole small Qwen3-MoE with random weights, and one layer's experts of a real width, 8 of 64 active, over tokens; medians of
interleaved runs. PEFT runs with transformers' default experts implementation, grouped_mm. Fails if outputs or gradients differ.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from row_writing import main
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from lora_kernels import accelerate
from lora_kernels.commands.timing import interleaved

RANK, TOP_K = 8, 8
WIDTHS = ((64, 512, 512), (64, 1024, 512), (64, 1024, 768))  # experts, hidden, intermediate
TOKENS = (64, 256, 1024)
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


class Layer(nn.Module):
    """One layer's experts, each token's chosen at random with random weights."""

    def __init__(self, E: int, hidden: int, intermediate: int):
        super().__init__()
        config = Qwen3MoeConfig(num_experts=E, hidden_size=hidden, moe_intermediate_size=intermediate)
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, ids, weights)


def small_model() -> nn.Module:
    size = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {
        "moe_intermediate_size": 64,
        "num_experts": 64,
        "num_experts_per_tok": TOP_K,
        "head_dim": 32,
        "norm_topk_prob": True,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**size, **experts, intermediate_size=256))


def step(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Callable[[], dict[str, Tensor]]:
    """A forward and backward pass; its results by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run() -> dict[str, Tensor]:
        y = call(model)
        grads = torch.autograd.grad(y.square().mean(), list(trained.values()))
        return {"y": y.detach(), **dict(zip(trained, grads, strict=True))}

    return run


def measured(experts: str, tokens: int, model: nn.Module, call: Callable[[nn.Module], Tensor], repeats: int) -> dict[str, Any]:
    """Milliseconds of PEFT's and ours, after they have agreed."""
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS, init_lora_weights=False)
    theirs = get_peft_model(model, config)
    ours = copy.deepcopy(theirs)
    report = accelerate(ours)
    assert not {**report.falling_back, **report.skipped}, report
    ways = {"peft": step(theirs, call), "accelerated": step(ours, call)}
    own = ways["accelerated"]()
    for key, value in ways["peft"]().items():
        torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-3 * value.abs().max().item())
    found = interleaved(ways, repeats=repeats)
    ms = {way: {part: 1e3 * value for part, value in vars(t).items() if part != "repeats"} for way, t in found.items()}
    return {"experts": experts, "tokens": tokens, "ms": ms, "ratio": found["peft"].median / found["accelerated"].median}


def rows(repeats: int) -> Any:
    for tokens in TOKENS[:2]:
        ids = torch.randint(1000, (1, tokens))
        name = "Qwen3-MoE of 4 layers, 8 of 64 experts, hidden 128, intermediate 64"
        yield measured(name, tokens, small_model(), lambda m, ids=ids: m(input_ids=ids).logits, repeats)
    for E, hidden, intermediate in WIDTHS:
        for tokens in TOKENS:
            x, weights = torch.randn(tokens, hidden), torch.rand(tokens, TOP_K).softmax(-1)
            chosen = torch.rand(tokens, E).topk(TOP_K).indices
            name = f"a layer, {TOP_K} of {E} experts, hidden {hidden}, intermediate {intermediate}"
            layer = Layer(E, hidden, intermediate)
            yield measured(name, tokens, layer, lambda m, x=x, c=chosen, w=weights: m(x, c, w), repeats)


def shown(row: dict[str, Any]) -> str:
    times = ", ".join(f"{way} {ms['median']:.1f} ms" for way, ms in row["ms"].items())
    return f"{row['experts']}, {row['tokens']} tokens: {times}: {row['ratio']:.2f}x"


if __name__ == "__main__":
    main(__doc__, 5, rows, shown)
