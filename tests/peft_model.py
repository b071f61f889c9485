"""A small model under PEFT for the tests of acceleration: two adapted layers, one of them transformers' Conv1D."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

FAST = "fast"  # the key of AccelerationReport.calls for calls that these kernels computed


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 24)
        self.up, self.down, self.head = nn.Linear(24, 40), Conv1D(24, 40), nn.Linear(24, 5)

    def forward(self, ids):
        return self.head(torch.relu(self.down(torch.tanh(self.up(self.embed(ids))))))


def adapted(*, seed=0, model=None, **options):
    torch.manual_seed(seed)
    options = {"target_modules": ["up", "down"], "r": 4, "init_lora_weights": False, **options}
    return get_peft_model(Model() if model is None else model, LoraConfig(**options)).eval()


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def layer(model, name="up"):
    return model.base_model.model.get_submodule(name)
