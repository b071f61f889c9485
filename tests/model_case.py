"""A small model with a tied head, and what the tests of whole models do with it."""

import torch
from torch import nn

from lora_kernels import LoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 6, bias=False), nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + self.out(torch.tanh(self.v_proj(self.q_proj(x)))))


class Model(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
QV = {"target_modules": ["q_proj", "v_proj"]}


def train(model, steps=3, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).square().mean().backward()
        optimizer.step()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def fail_at(monkeypatch, number):
    """The `number`th adapter that a layer gets from now on finds no memory."""
    original, calls = LoRALinear.add_adapter, []

    def failing(self, *args, **options):
        calls.append(self)
        if len(calls) == number:
            raise MemoryError
        original(self, *args, **options)

    monkeypatch.setattr(LoRALinear, "add_adapter", failing)
