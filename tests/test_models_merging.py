"""merge_lora and unmerge_lora on whole models."""

import pytest
import torch
from model_case import QV, TOKENS, Model, snapshot, train
from torch.distributed.fsdp import fully_shard

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    add_lora,
    merge_lora,
    remove_lora,
    save_merged,
    set_adapter,
    unmerge_lora,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge(dtype):
    model = Model().to(dtype).eval()
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    before, expected = snapshot(model), model(TOKENS)
    merge_lora(model)
    assert torch.allclose(model(TOKENS), expected, atol=1e-5 if dtype == torch.float32 else 0.2)
    for action in (merge_lora, lambda m: set_adapter(m, None), lambda m: add_lora(m, LoRAConfig(), "x")):
        with pytest.raises(RuntimeError, match=r"the model is merged; call unmerge_lora\(model\) first"):
            action(model)
    with pytest.raises(RuntimeError, match="gets no gradient"):
        model.train()(TOKENS)
    unmerge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="cannot unmerge: no layer is merged"):
        unmerge_lora(model)


def test_a_failed_merge_merges_nothing(monkeypatch):
    model, calls = Model(), []
    add_lora(model, LoRAConfig(r=2))
    original = LoRALinear.merge

    def failing(self):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        original(self)

    monkeypatch.setattr(LoRALinear, "merge", failing)
    with pytest.raises(MemoryError):
        merge_lora(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_state_dict_is_not_loaded_into_a_merged_model(quantize):
    """unmerge_lora would drop it: no layer and no other module has changed."""
    model = Model()
    add_lora(model, LoRAConfig(r=2, init_lora_weights=False, **QV), quantize=quantize)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    merge_lora(model.eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state["embed.weight"].zero_()
    with pytest.raises(RuntimeError, match=r"cannot load a state dict: LoRALinear is merged; call unmerge\(\) first"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict({"embed.weight": state["embed.weight"]}, strict=False)  # nothing of a merged layer
    unmerge_lora(model)
    model.load_state_dict(state)


def test_merge_then_remove_is_a_plain_fine_tuned_model():
    model = Model()
    add_lora(model, LoRAConfig(r=2, bias="all", modules_to_save=["lm_head"]))
    train(model)
    expected = model.eval()(TOKENS)
    merge_lora(model)
    remove_lora(model)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)


def test_fsdp2_is_refused(tmp_path):
    """It would put its own weights back, so that the merged model went on without its adapter."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Model()
        add_lora(model, LoRAConfig(r=2, init_lora_weights=False))
        fully_shard(model)
        before = model(TOKENS)
        for action in (merge_lora, lambda m: save_merged(m, tmp_path / "merged")):
            with pytest.raises(ValueError, match=r"under fully_shard \(FSDP2\), which would put its own weights back"):
                action(model)
        assert torch.equal(model(TOKENS), before)
        assert not (tmp_path / "merged").exists()
    finally:
        torch.distributed.destroy_process_group()
