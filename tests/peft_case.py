"""PEFT layers for the tests: built, run, and compared with their accelerated selves by the one tolerance rule."""

import copy
from dataclasses import dataclass

import torch
from accuracy import violations
from peft import LoraConfig, get_peft_model
from peft_model import FAST
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_kernels import accelerate
from lora_kernels.integrations.peft import AccelerationReport
from lora_kernels.mask import draw_seed, dropout_mask, keep_scale


class FixedMask(nn.Module):
    """The dropout of lora_linear with a known seed, for PEFT's own forward."""

    def __init__(self, p: float, seed: Tensor):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        keep = dropout_mask(x.shape[:-1].numel(), x.shape[-1], self.p, self.seed)
        return x * keep.view(x.shape) * keep_scale(self.p)


@dataclass
class Layer:
    """One PEFT layer over a frozen base with everything that its result depends on."""

    shape: tuple[int, ...] = (3, 7)  # of x, without the features
    K: int = 24
    N: int = 33
    dtype: torch.dtype = torch.float32
    bias: bool = True
    conv1d: bool = False
    autocast: torch.dtype | None = None
    autocast_adapter_dtype: bool = True
    lora_dropout: float = 0.0
    options: tuple[tuple[str, object], ...] = ()  # further ones of LoraConfig

    def build(self) -> nn.Module:
        """A PeftModel of the one layer, with B that is not zero."""
        base = Conv1D(self.N, self.K) if self.conv1d else nn.Linear(self.K, self.N, bias=self.bias)
        if self.conv1d:
            nn.init.normal_(base.bias)
            nn.init.normal_(base.weight, std=self.K**-0.5)
        config = LoraConfig(
            **{"target_modules": ["0"], "r": 4, "lora_alpha": 6, "lora_dropout": self.lora_dropout, **dict(self.options)},
            fan_in_fan_out=self.conv1d,
            init_lora_weights=False,
        )
        base = nn.Sequential(base).to(self.dtype)
        model = get_peft_model(base, config, autocast_adapter_dtype=self.autocast_adapter_dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                nn.init.normal_(parameter)
        return model

    def accelerate(self, model: nn.Module) -> AccelerationReport:
        return accelerate(model)

    def fix_mask(self, layer: nn.Module, seed: Tensor) -> None:
        """Let PEFT's layer drop what lora_linear with this seed does."""
        layer.lora_dropout["default"] = FixedMask(self.lora_dropout, seed)

    def run(self, model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """y and the gradients of x and of every trained parameter, by name."""
        x = x.detach().requires_grad_()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            y = model(x)
        grads = torch.autograd.grad(y, [x, *trained.values()], dy.to(y.dtype))
        return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}

    def check(self) -> None:
        """Assert the rule for the accelerated layer against PEFT's own, PEFT's dtypes, and that the fast path computed."""
        plain = self.build()
        ours = copy.deepcopy(plain)
        report = self.accelerate(ours)
        x, dy = (
            torch.randn(*self.shape, self.K).to(self.dtype),
            torch.randn(*self.shape, self.N).to(self.autocast or self.dtype),
        )
        torch.manual_seed(11)
        seed = draw_seed(x.device)
        if self.lora_dropout:
            self.fix_mask(plain.base_model.model[0], seed)
        torch.manual_seed(11)
        tested, reference = self.run(ours, x, dy), self.run(plain, x, dy)
        exact_case = copy.copy(self)
        exact_case.autocast = None
        exact = exact_case.run(copy.deepcopy(plain).double(), x.double(), dy.double())
        assert report.calls() == {FAST: 1}
        assert {name: t.dtype for name, t in tested.items()} == {name: t.dtype for name, t in reference.items()}
        broken = violations(tested, reference, exact, self.autocast or self.dtype)
        assert not broken, f"{self}: {broken}"
