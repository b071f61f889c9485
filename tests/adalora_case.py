"""A small model with AdaLoRA made here and by PEFT, with the same adapters, and a run of both on the same gradients."""

from typing import Any

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import AdaLoRAConfig, RankAllocator, add_lora

SETTINGS: dict[str, Any] = {
    **{"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2, "total_step": 20, "lora_alpha": 8},
    "target_modules": ["down", "out", "up"],
}
X = torch.randn(9, 12, generator=torch.Generator().manual_seed(5))
PREFIX = "base_model.model."


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.out = nn.Linear(12, 10), Conv1D(8, 10), nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def own(**options: Any) -> nn.Module:
    made = model()
    add_lora(made, AdaLoRAConfig(**{**SETTINGS, **options}))
    return made


def peft(**options: Any) -> Any:
    return get_peft_model(model(), AdaLoraConfig(**{**SETTINGS, **options}, fan_in_fan_out=False))


def trained(made: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the plain model."""
    return {name.removeprefix(PREFIX): p for name, p in made.named_parameters() if p.requires_grad}


class Pair:
    """PEFT's model and ours, trained by the same optimizer on PEFT's gradients."""

    def __init__(self, **options: Any):
        self.theirs, self.ours = peft(**options), own(**options)
        self.parameters = trained(self.theirs), trained(self.ours)
        assert self.parameters[0].keys() == self.parameters[1].keys()
        with torch.no_grad():
            for name, parameter in self.parameters[0].items():
                self.parameters[1][name].copy_(parameter)
        self.optimizers = [torch.optim.AdamW(own.values(), 0.05) for own in self.parameters]
        self.allocator = RankAllocator(self.ours)

    def step(self, number: int, *, noise: bool = False) -> int:
        """One training step of both, or one on noise, from which no score is like another; the budget of ours."""
        torch.manual_seed(number)
        self.theirs(torch.randn(9, 12)).sub(1).square().mean().backward()
        for name, parameter in self.parameters[0].items():
            if noise:
                parameter.grad = torch.randn_like(parameter) * torch.rand_like(parameter).mul(5).exp()
            self.parameters[1][name].grad = parameter.grad.clone()
        for optimizer in self.optimizers:
            optimizer.step()
        self.theirs.base_model.update_and_allocate(number)
        budget = self.allocator.step(number)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return budget

    def ranks(self) -> dict[str, int]:
        """PEFT's, by path; init_r before its first decision."""
        pattern = self.theirs.peft_config["default"].rank_pattern
        named = {key.removesuffix(".default").removesuffix(".lora_E"): sum(keep) for key, keep in (pattern or {}).items()}
        return named or dict.fromkeys(self.allocator.ranks(), self.allocator.config.init_r)

    def assert_equal(self) -> None:
        """Every parameter to the bit, and the ranks."""
        for name, parameter in self.parameters[0].items():
            assert torch.equal(self.parameters[1][name], parameter), name
        assert self.allocator.ranks() == self.ranks()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
