"""What the benchmark times beside this package: `--compare NAME,...`, each on the same tensors and in the same run.

peft           PEFT's layer, with adapters of x's dtype, and with float32 adapters (its default) over a 16-bit base
peft-compile   the same under torch.compile, adapters of x's dtype
unsloth-style  the order of operations of Unsloth's LoRA_W, LoRA_QKV and LoRA_MLP (unsloth_order.py); no dropout
bnb            bitsandbytes' Linear4bit (NF4, nested absmax) under PEFT, and this package over the same 4-bit weights
lorafusion     LoRAFusion's Triton kernels from the checkout that `--lorafusion DIR` names

The bare frozen linear is always there. A peer that cannot run is listed with the reason.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import LoRALinear
from ..nf4.weight import NF4Weight, quantize_nf4
from . import unsloth_order
from .accuracy_gate import Problem
from .blocks import Block, BlockProblem
from .cases import BOTH, Case
from .console import CommandError

PEERS = ("peft", "peft-compile", "unsloth-style", "bnb", "lorafusion")
BARE, OURS = "bare frozen linear", "lora_kernels"
OURS_FP32, OURS_NF4 = "lora_kernels, fp32 adapters", "lora_kernels, NF4"
PEFT, PEFT_FP32, PEFT_COMPILED = "PEFT eager", "PEFT eager, fp32 adapters", "PEFT compiled"
UNSLOTH, BNB, LORAFUSION = "Unsloth's order", "bitsandbytes NF4 + PEFT", "LoRAFusion"
HEADINGS = {  # of the columns "times faster than"
    PEFT: "x PEFT",
    PEFT_FP32: "x PEFT fp32",
    PEFT_COMPILED: "x compiled",
    UNSLOTH: "x Unsloth",
    BNB: "x bnb",
    LORAFUSION: "x LoRAFusion",
}


@dataclass(frozen=True)
class Variant:
    """One row of a case: a module over the case's tensors. ours: it is this package's, over these layers."""

    name: str
    module: nn.Module
    ours: BlockProblem | None = None
    nf4: bool = False


def parse(text: str) -> tuple[str, ...]:
    """The peers of "peft,bnb", "none" or "all". Raises CommandError for an unknown name."""
    names = {"none": (), "all": PEERS}.get(text) or tuple(name.strip() for name in text.split(",") if text != "none")
    for name in names:
        if name not in PEERS:
            raise CommandError(f"--compare: got {name!r}, expected none, all, or some of {', '.join(PEERS)}")
    return names


def why_not(name: str, lorafusion: Path | None = None) -> str | None:
    """None if peer `name` is installed, otherwise the reason that it is not measured in this run."""
    if name in ("peft", "peft-compile"):
        return _missing("peft")
    if name == "bnb":
        return _missing("peft") or _missing("bitsandbytes")
    if name == "lorafusion":
        if lorafusion is None:
            return "no checkout given; pass --lorafusion DIR"
        if not (lorafusion / "lorafusion" / "ops").is_dir():
            return f"--lorafusion: {lorafusion} has no folder lorafusion/ops"
        return None if torch.cuda.is_available() else "its kernels need a CUDA device"
    return None


def why_not_here(name: str, case: Case) -> str | None:
    """None if peer `name` has a path for `case`, otherwise the reason."""
    if name == "unsloth-style" and case.p > 0 and case.passes == BOTH:
        return "its fused path has no dropout: it leaves this case to PEFT"
    return None


def variants(name: str, problem: BlockProblem, lorafusion: Path | None = None) -> list[Variant]:
    """The rows of peer `name`, or of "bare" or "ours", over `problem`'s tensors."""
    wide = None if problem.case.dtype == torch.float32 else problem.map(lambda layer: layer.with_adapters(torch.float32))
    if name == "bare":
        return [_variant(BARE, problem, frozen)]
    if name == "ours":
        rows = [_variant(OURS, problem, ours, problem)]
        return rows + ([_variant(OURS_FP32, wide, ours, wide)] if wide else [])
    if name == "peft":
        return [_variant(PEFT, problem, peft)] + ([_variant(PEFT_FP32, wide, peft)] if wide else [])
    if name == "peft-compile":
        torch._dynamo.reset()  # of other cases' shapes, which would count as recompilations
        eager = _variant(PEFT_COMPILED, problem, peft)
        return [replace(eager, module=torch.compile(eager.module, dynamic=False))]  # type: ignore[arg-type]
    if name == "unsloth-style":
        return [Variant(UNSLOTH, UnslothBlock(problem).train())]
    if name == "bnb":
        return [_variant(BNB, problem, bnb), replace(_variant(OURS_NF4, problem, ours_nf4, problem), nf4=True)]
    kernels = _lorafusion(lorafusion)
    return [_variant(LORAFUSION, problem, lambda layer: LoRAFusionLinear(layer, kernels))]


def _variant(
    name: str, problem: BlockProblem, build: Callable[[Problem], nn.Module], ours: BlockProblem | None = None
) -> Variant:
    layers = {key: build(layer) for key, layer in problem.layers.items()}
    return Variant(name, Block(problem.case.shape.block, layers).train(), ours)


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"not installed; run `pip install {package}`"


# ---- one layer of each kind ----


def frozen(problem: Problem) -> nn.Linear:
    """The layer without an adapter."""
    linear = nn.Linear(problem.in_features, problem.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.W, requires_grad=False)
    return linear


def ours(problem: Problem, **options: Any) -> nn.Module:
    """This package's layer."""
    layer = LoRALinear.from_linear(
        frozen(problem), r=problem.r, lora_alpha=problem.lora_alpha, lora_dropout=problem.p, **options
    )
    return with_adapter(layer, problem)


def ours_nf4(problem: Problem) -> nn.Module:
    """This package's layer over a 4-bit copy of W with nested absmax, as bitsandbytes' beside it."""
    return ours(problem, quantize="nf4")


def nf4_problem(problem: Problem) -> tuple[Problem, NF4Weight]:
    """(the problem with the values that W has in 4 bits, the NF4Weight): truth for `ours_nf4`, and what it is given."""
    weight = quantize_nf4(problem.W, blocksize=64, double_quant=True)
    return replace(problem, W=weight.dequantize(problem.W.dtype)), weight


def peft(problem: Problem, linear: nn.Module | None = None) -> nn.Module:
    """PEFT's own layer over `linear`, with its adapters in the dtype of `problem`'s: float32 is PEFT's default."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=problem.r, lora_alpha=problem.lora_alpha, lora_dropout=problem.p, target_modules=["linear"], bias="none"
    )
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
            adapter.weight = nn.Parameter(value.clone())
        else:
            adapters["default"] = nn.Parameter(value.clone())
    return layer.train()


class UnslothBlock(Block):
    """Single layers, and q, k, v and the MLP as one function each."""

    def __init__(self, problem: BlockProblem):
        self.s = float(next(iter(problem.layers.values())).lora_alpha_over_r)
        layers = {name: unsloth_order.Linear(p.W, p.A, p.B, self.s) for name, p in problem.layers.items()}
        super().__init__(problem.case.shape.block, layers)  # type: ignore[arg-type]

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return unsloth_order.QKVFunction.apply(x, self.s, *self._weights("q", "k", "v"))

    def mlp(self, x: Tensor) -> Tensor:
        return unsloth_order.MLPFunction.apply(x, self.s, *self._weights("gate", "up", "down"))

    def _weights(self, *names: str) -> list[Tensor]:
        return [tensor for name in names for tensor in self.layers[name].weights()]  # type: ignore[operator]


class LoRAFusionLinear(unsloth_order.Linear):
    """Holds the tensors; its call is LoRAFusion's fused_linear_lora, which takes [batch, length, features]."""

    def __init__(self, problem: Problem, kernels: ModuleType):
        super().__init__(problem.W, problem.A, problem.B, float(problem.lora_alpha_over_r))
        self.p, self.kernels = problem.p, kernels

    def forward(self, x: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        return self.kernels.fused_linear_lora(x[None], self.weight, self.A, self.B, alpha=self.s, dropout_p=p)[0]


def _lorafusion(folder: Path | None) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module("lorafusion.ops.lora_v1")
