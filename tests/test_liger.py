"""Liger's kernels beside ours in one model: RoPE, RMSNorm and the loss theirs, attention's linears and the MLP ours."""

import copy

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from triton_interpreter import DEVICE  # before Liger: its kernels read where they run when they are defined

from lora_kernels import accelerate

liger = pytest.importorskip("liger_kernel.transformers")


def test_one_model_has_both(monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)  # put back
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    plain = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**size)), config).to(DEVICE)
    both = copy.deepcopy(plain)
    ids = torch.randint(100, (2, 16), device=DEVICE)
    expected = plain(input_ids=ids, labels=ids).loss
    expected.backward()

    rms_norm = DEVICE.type == "cuda"  # Triton 3.6's interpreter has no `eps.to`, by which its kernel begins
    options = {"rope": True, "rms_norm": rms_norm, "swiglu": False, "cross_entropy": False, "fused_linear_cross_entropy": True}
    liger.apply_liger_kernel_to_llama(model=both.get_base_model(), **options)
    report = accelerate(both)
    loss = both(input_ids=ids, labels=ids).loss
    loss.backward()

    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert both.get_base_model().forward.__func__.__module__.startswith("liger_kernel")
    assert set(report.calls()) == {"fast"}
    assert report.blocks.calls() == {"fused": 4}  # q, k and v, and the MLP, of two layers
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(both.parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * theirs.grad.abs().max().item())
