"""Models for the tests of fused blocks: tiny, in float64, adapted by add_lora; their results before and after fuse_blocks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tiny_models import gpt2, ids, llama
from torch import Tensor, nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora
from lora_kernels.functional.linear import LINEAR
from lora_kernels.operation import call
from lora_kernels.values import Dropout, LoRAWeights

FUSED = "fused"  # the key of BlockReport.calls
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
TOKENS = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGE = {"image_size": 8, "patch_size": 4}


class Case(NamedTuple):
    """make() gives the model; of each of its two layers so many groups and MLPs are fused; skipped is in a reason."""

    make: Callable[[], nn.Module]
    targets: list[str] | str
    groups: int
    mlps: int
    skipped: str = ""
    images: bool = False

    def model(self, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().double()
        options = {"target_modules": self.targets, "r": 4, "init_lora_weights": False, **options}
        add_lora(model, LoRAConfig(**options))
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        if self.images:
            return {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64)}
        tokens = ids()
        return {"input_ids": tokens, "labels": tokens}


def causal(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = {**SIZE, **TOKENS, "num_key_value_heads": 2, **options}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))

    return make


def headless(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from transformers import AutoConfig, AutoModel

        return AutoModel.from_config(AutoConfig.for_model(kind, **{**SIZE, **IMAGE, **options}))

    return make


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZE, vocab_size=60, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "llama": Case(llama, ALL, 1, 1),
    "llama-some": Case(llama, SOME, 1, 1),
    "qwen2-biases": Case(causal("qwen2"), ALL, 1, 1),
    "qwen3": Case(causal("qwen3", head_dim=8), ["q_proj", "k_proj", "up_proj"], 1, 1),
    "mistral": Case(causal("mistral", head_dim=8), ALL, 1, 1),
    "smollm2-tied": Case(causal("llama", tie_word_embeddings=True, num_key_value_heads=1), ALL, 1, 1),
    "gemma2": Case(causal("gemma2", head_dim=8), ALL, 1, 1),
    "gemma3": Case(causal("gemma3_text", head_dim=8), ALL, 1, 1),
    "phi3": Case(causal("phi3"), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], 0, 1),
    "gpt2": Case(gpt2, ["c_attn", "c_fc", "c_proj"], 0, 1),
    "nemotron-relu2": Case(causal("nemotron"), ALL, 1, 1),
    "bert": Case(bert, ["query", "value", "dense"], 1, 0, skipped="two modules"),
    "clip-quick-gelu": Case(headless("clip_vision_model"), ["q_proj", "k_proj", "fc1"], 1, 0, "is none of silu, gelu", True),
    "clip-gelu": Case(headless("clip_vision_model", hidden_act="gelu"), ["q_proj", "v_proj", "fc1", "fc2"], 1, 1, "", True),
    "vit": Case(headless("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), ["v_proj", "fc2"], 1, 1, "", True),
    "falcon-h1": Case(
        causal("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mlp_multipliers=[0.5, 0.7]),
        ALL,
        2,  # gate and up are one, although the MLP cannot be
        0,
        "it is off by 0.3 of it",
    ),
}


def results(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model gives, its loss, and the gradient of every trained parameter."""
    model.zero_grad()
    output = model(**batch)
    if "loss" in output:
        y, loss = output.logits, output.loss
    else:
        y = output.last_hidden_state
        loss = (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).square().sum()
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    return {"y": y.detach(), "loss": loss.detach(), **{name: grad.clone() for name, grad in trained.items()}}


def check_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """Each tensor to `tolerance` of its largest element, or of the largest gradient's where it is nearly zero."""
    assert got.keys() == expected.keys()
    largest = max(t.abs().max().item() for t in expected.values())
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-5 * largest)
        assert got[name].dtype == value.dtype
        assert (got[name] - value).abs().max().item() <= tolerance * scale, name


OFFSETS = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1, "down": 2, "fc1": 1, "fc2": 2, "query": 0, "key": 1, "value": 2}


class SameMasks:
    """One seed for every operation, and for the layers alone the offsets of their masks in a block."""

    def __init__(self, model: nn.Module, monkeypatch: Any):
        self.offsets = {
            module.lora_A["default"].data_ptr(): OFFSETS.get(path.rpartition(".")[2].removesuffix("_proj"), 0)
            for path, module in model.named_modules()
            if hasattr(module, "lora_A")
        }
        self.seed = torch.tensor(77)
        monkeypatch.setattr("lora_kernels.operation.definition.draw_seed", lambda device: self.seed)
        monkeypatch.setattr("lora_kernels.layers.linear.lora_linear", self.lora_linear)

    def lora_linear(self, x, W, A, B, c, *, scaling, dropout_p, magnitude=None):
        dropout = Dropout(dropout_p, self.seed, self.offsets[A.data_ptr()]) if dropout_p else None
        (y,) = call(LINEAR, x, (LoRAWeights(W, A, B, c, scaling, magnitude),), dropout)
        return y.view(*x.shape[:-1], y.shape[-1])


class Attention(nn.Module):
    """q, k and v of x, or k and v of another tensor; `between` happens to x after q was computed."""

    def __init__(self, p=0.0, ranks=(2, 3, 4)):
        super().__init__()
        torch.manual_seed(0)
        for name, r in zip(("q_proj", "k_proj", "v_proj"), ranks, strict=True):
            linear = nn.Linear(8, 8, bias=name == "k_proj", dtype=torch.float64)
            lora = {"r": r, "lora_dropout": p, "init_lora_weights": False}
            setattr(self, name, LoRALinear.from_linear(linear, **lora) if r else linear.requires_grad_(False))
        self.between = lambda x: x

    def forward(self, x, states=None, cached=False):
        q = self.q_proj(x)
        x = self.between(x if states is None else states)
        if cached:
            return q
        return q + torch.tanh(self.k_proj(x)) * self.v_proj(x)


X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def attention_results(model, *inputs, **options):
    x = X.clone().requires_grad_()
    model.zero_grad()
    y = model(x * 1, *inputs, **options)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def adapted(linear, r=2, **options):
    return LoRALinear.from_linear(linear, r=r, init_lora_weights=False, **options)


class MLP(nn.Module):
    """Gated: what `body(self, x)` says over gate (first), up (second) and down (last)."""

    def __init__(self, body, dtype=torch.float32, lora=("first", "second", "last"), p=0.0, inner=16):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"first": (8, inner), "second": (8, 16), "last": (16, 8)}
        for name, (K, N) in sizes.items():
            linear = nn.Linear(K, N, bias=name == "second", dtype=dtype).requires_grad_(False)
            setattr(self, name, adapted(linear, lora_dropout=p) if name in lora else linear)
        self.drop, self.norm, self.factor, self.body = nn.Dropout(0.5), nn.LayerNorm(16, dtype=dtype), 0.7, body

    def forward(self, x):
        return self.body(self, x)


class Plain(MLP):
    """Without a gate."""

    def __init__(self, body, **options):
        super().__init__(body, **options)
        del self.second


class Halves(Plain):
    """gate and up are halves of the first one."""

    def __init__(self, body, **options):
        super().__init__(body, inner=32, **options)


ROWS = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(4))


def mlp_results(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)]
