"""The layers that the benchmark times, one of each kind, over the tensors of a Problem."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...cases.linear import Problem
from ...functional.glu_mlp import lora_glu_mlp
from ...functional.linear import lora_linear_group
from ...layers.linear import LoRALinear
from ...values import LoRAWeights
from . import unsloth_order
from .blocks import TOGETHER, Block, BlockProblem


def frozen(problem: Problem) -> nn.Linear:
    """The layer without an adapter."""
    linear = nn.Linear(problem.in_features, problem.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    return linear


def ours(problem: Problem, **options: Any) -> nn.Module:
    """This package's layer."""
    settings: dict[str, Any] = {"lora_alpha": problem.lora_alpha, "lora_dropout": problem.p, "use_dora": problem.case.dora}
    return with_adapter(LoRALinear.from_linear(frozen(problem), r=problem.r, **settings, **options), problem)


def ours_nf4(problem: Problem) -> nn.Module:
    """This package's layer over a 4-bit copy of W with nested absmax, as bitsandbytes' beside it."""
    return ours(problem, quantize="nf4")


def peft(problem: Problem, linear: nn.Module | None = None) -> nn.Module:
    """PEFT's own layer over `linear`, with its adapters in the dtype of `problem`'s: float32 is PEFT's default."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"lora_alpha": int(problem.lora_alpha), "lora_dropout": problem.p, "use_dora": problem.case.dora}
    config = LoraConfig(r=problem.r, target_modules=["linear"], bias="none", **settings)
    model: Any = nn.ModuleDict({"linear": frozen(problem) if linear is None else linear})
    model.is_loaded_in_4bit = linear is not None  # PEFT asks the model, not the layer
    promote = problem.A.dtype == torch.float32 and problem.x.dtype != torch.float32
    get_peft_model(model, config, autocast_adapter_dtype=promote)  # exchanges the layer in place
    return with_adapter(model["linear"], problem)


def bnb(problem: Problem) -> nn.Module:
    """bitsandbytes' Linear4bit under PEFT's layer for it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    linear: Any = Linear4bit(problem.in_features, problem.out_features, bias=False, compute_dtype=problem.x.dtype, **options)
    linear.weight = Params4bit(problem.W.detach().clone(), requires_grad=False, module=linear, **options)
    return peft(problem, linear.to(problem.x.device))


def with_adapter(layer: Any, problem: Problem) -> nn.Module:
    """`layer` in training mode with copies of `problem`'s adapter."""
    for adapters, value in ((layer.lora_A, problem.A), (layer.lora_B, problem.B)):
        adapter = adapters["default"]
        if isinstance(adapter, nn.Linear):  # PEFT keeps a module, this package a parameter
            adapter.weight = nn.Parameter(value.detach().clone())
        else:
            adapters["default"] = nn.Parameter(value.detach().clone())
    if problem.m is not None:
        own = isinstance(layer, LoRALinear)
        owner, name = (layer.lora_magnitude, "default") if own else (layer.lora_magnitude_vector["default"], "weight")
        setattr(owner, name, nn.Parameter(problem.m.detach().clone()))
    return layer.train()


class FusedBlock(Block):
    """This package's layers, of which q, k and v are one operation, and the MLP another one."""

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        members, p = self._members(x, "qkv")
        return lora_linear_group(x, members, dropout_p=p)

    def mlp(self, x: Tensor) -> Tensor:
        members, p = self._members(x, "mlp")
        return lora_glu_mlp(x, *members, dropout_p=p)

    def _members(self, x: Tensor, kind: str) -> tuple[list[LoRAWeights], float]:
        found = [self.layers[name].projection(x) for name in TOGETHER[kind]]  # type: ignore[operator]
        return [member.weights for member in found], found[0].dropout_p


class UnslothBlock(Block):
    """Single layers, and q, k, v and the MLP as one function each."""

    def __init__(self, problem: BlockProblem):
        self.s = float(next(iter(problem.layers.values())).case.scaling)
        layers = {name: unsloth_order.Linear(p.W, p.A, p.B, self.s) for name, p in problem.layers.items()}
        super().__init__(problem.case.shape.block, layers)  # type: ignore[arg-type]

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return unsloth_order.QKVFunction.apply(x, self.s, *self._weights("qkv"))

    def mlp(self, x: Tensor) -> Tensor:
        return unsloth_order.MLPFunction.apply(x, self.s, *self._weights("mlp"))

    def _weights(self, kind: str) -> list[Tensor]:
        return [tensor for name in TOGETHER[kind] for tensor in self.layers[name].weights()]  # type: ignore[operator]


class LoRAFusionLinear(unsloth_order.Linear):
    """Holds the tensors; its call is LoRAFusion's fused_linear_lora, which takes [batch, length, features]."""

    def __init__(self, problem: Problem, kernels: ModuleType):
        super().__init__(problem.W, problem.A, problem.B, float(problem.case.scaling))
        self.p, self.kernels = problem.p, kernels

    def forward(self, x: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        return self.kernels.fused_linear_lora(x[None], self.weight, self.A, self.B, alpha=self.s, dropout_p=p)[0]
