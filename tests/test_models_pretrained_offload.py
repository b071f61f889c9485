"""save_pretrained of a transformers model with LoRA layers that accelerate's hooks offload."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from pretrained_case import TARGETS, adapted, llama
from safetensors.torch import load_file

from lora_kernels import LoRAConfig, add_lora

pytestmark = pytest.mark.filterwarnings("ignore:save_pretrained wrote the model without its adapters")


@pytest.mark.parametrize("given", [{}, {"state_dict": None}], ids=str)
@pytest.mark.parametrize(("first", "base"), [("add_lora", "dense"), ("add_lora", "nf4"), ("cpu_offload", "dense")])
def test_a_model_that_accelerate_offloads_is_refused_before_anything_is_written(first, given, base, tmp_path):
    if first == "add_lora":
        model = cpu_offload(adapted(tmp_path, base), torch.device("cpu"))
    else:
        model = cpu_offload(llama(tmp_path), torch.device("cpu"))
        add_lora(model, LoRAConfig(r=2, **TARGETS))
    with pytest.raises(ValueError, match=r"save_pretrained: model\..* is on the meta device.*remove_hook_from_submodules"):
        model.save_pretrained(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
    remove_hook_from_submodules(model)
    model.save_pretrained(tmp_path / "out", **given)
    assert (tmp_path / "out" / "adapters").exists()


def test_a_model_that_transformers_offloaded_is_saved_by_it(tmp_path):
    """With a device_map, transformers itself reads what it keeps elsewhere."""
    llama(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    device_map = {**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = llama(tmp_path, device_map=device_map, offload_folder=tmp_path / "elsewhere")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    add_lora(model, LoRAConfig(r=2, **TARGETS))
    model.save_pretrained(tmp_path / "out")
    base, read = load_file(tmp_path / "base" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert base.keys() == read.keys()
    assert all(torch.equal(value, read[name]) for name, value in base.items())
