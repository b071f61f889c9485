"""Random models of a few thousand parameters, with the modules that LoRA targets in each and a batch to train on.

GPT-2 and T5, which are read as bitsandbytes', have rows of whole blocks: others it decodes wrongly on a CPU with AVX512.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Tiny:
    """make() gives the model, batch() what it is called with; loss(output, batch) is trained on."""

    make: Callable[[], nn.Module]
    target_modules: list[str]
    batch: Callable[[], dict[str, Tensor]]
    loss: Callable[[Any], Tensor] = lambda output: output.loss


def ids(rows: int = 2, columns: int = 9, vocabulary: int = 60) -> Tensor:
    return torch.randint(2, vocabulary, (rows, columns))


def causal_batch() -> dict[str, Tensor]:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}


def llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**{**size, **tokens, "num_hidden_layers": 2, **options}))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropouts = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1, **dropouts)
    )


def mixtral(vocabulary: int = 60) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return MixtralForCausalLM(MixtralConfig(**size, **tokens, num_hidden_layers=2, num_local_experts=4))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 60}
    return BertForSequenceClassification(
        BertConfig(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 64, "d_ff": 64, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 60}
    return T5ForConditionalGeneration(T5Config(**size, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))


class Attention(nn.Module):
    """diffusers' attention block on its own."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import Attention as Block

        super().__init__()
        self.block = Block(query_dim=32, cross_attention_dim=24, heads=2, dim_head=16)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states, encoder_hidden_states=encoder_hidden_states)


MODELS = {
    "llama": Tiny(llama, ["q_proj", "v_proj", "gate_proj", "down_proj"], causal_batch),
    "gpt2": Tiny(gpt2, ["c_attn", "c_proj", "c_fc"], causal_batch),
    "bert": Tiny(bert, ["query", "value", "dense"], lambda: {"input_ids": ids(3), "labels": torch.tensor([0, 1, 2])}),
    "t5": Tiny(t5, ["q", "v"], lambda: {"input_ids": ids(), "labels": ids(columns=5)}),
    "diffusers": Tiny(
        Attention,
        ["to_q", "to_k", "to_v", "to_out.0"],
        lambda: {"hidden_states": torch.randn(2, 10, 32), "encoder_hidden_states": torch.randn(2, 4, 24)},
        lambda output: output.square().mean(),
    ),
}
