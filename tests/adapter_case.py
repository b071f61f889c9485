"""A small model with adapters made here and by PEFT, and the names of their files."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import LoRAConfig, add_lora, set_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.fc = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), Conv1D(8, 6)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.fc(torch.tanh(self.v_proj(self.q_proj(x)))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def model():
    torch.manual_seed(1)
    return Model().eval()


def fill(parameters):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3)


def peft_adapter(directory, **options):
    """A PeftModel with random adapters, saved in `directory`."""
    adapted = get_peft_model(model(), LoraConfig(r=4, **options)).eval()
    fill(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(directory, save_embedding_layers="lm_head" in options["target_modules"])
    return adapted


def own_adapter(adapter_name="default", base=None, **options):
    base = model() if base is None else base
    add_lora(base, LoRAConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}), adapter_name)
    set_adapter(base, adapter_name)
    fill(parameter for parameter in base.parameters() if parameter.requires_grad)
    return base


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
