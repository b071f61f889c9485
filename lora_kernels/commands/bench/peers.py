"""What the benchmark times beside this package: `--compare NAME,...`, each on the same tensors and in the same run.

peft           PEFT's layer, with adapters of x's dtype, and with float32 adapters (its default) over a 16-bit base
peft-compile   the same under torch.compile, adapters of x's dtype
unsloth-style  the order of operations of Unsloth's LoRA_W, LoRA_QKV and LoRA_MLP (unsloth_order.py); no dropout
bnb            bitsandbytes' Linear4bit (NF4, nested absmax) under PEFT, and this package over the same 4-bit weights
lorafusion     LoRAFusion's Triton kernels from the checkout that `--lorafusion DIR` names

The bare frozen linear is always there; in a block also this package's layers with q, k, v and the MLP as one operation each.
With `--variant dora` the layers are DoRA's, ours and PEFT's, beside this package's plain LoRA.
A peer that cannot run is listed with the reason.
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
from torch import nn

from ...cases.linear import Problem
from ...cases.members import MembersProblem
from ..console import FAILED, CommandError
from . import peer_layers
from .blocks import Block, BlockProblem
from .suites import BOTH, Workload

PEERS = ("peft", "peft-compile", "unsloth-style", "bnb", "lorafusion")
BARE, OURS = "bare frozen linear", "lora_kernels"
OURS_FP32, OURS_NF4 = "lora_kernels, fp32 adapters", "lora_kernels, NF4"
FUSED = ", fused blocks"  # behind one of these three
LORA = ", LoRA"  # behind one of them, beside DoRA
OURS_FUSED = OURS + FUSED
PEFT, PEFT_FP32, PEFT_COMPILED = "PEFT eager", "PEFT eager, fp32 adapters", "PEFT compiled"
UNSLOTH, BNB, LORAFUSION = "Unsloth's order", "bitsandbytes NF4 + PEFT", "LoRAFusion"
ROWS = {"peft": PEFT, "peft-compile": PEFT_COMPILED, "unsloth-style": UNSLOTH, "bnb": BNB, "lorafusion": LORAFUSION}
ACCELERATED = {PEFT: "PEFT accelerated", BNB: f"{BNB}, accelerated"}  # by accelerate(), in place of these two
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
    fused: bool = False

    def calls(self) -> dict[str, Problem | MembersProblem]:
        """Each different call of this package's that the module makes, by what it is."""
        if self.ours is None:
            return {}
        problem = self.ours.map(Problem.quantized) if self.nf4 else self.ours
        together = problem.fused() if self.fused else {}
        inside = {name for members in together.values() for name in members.members}
        alone = [layer for name, layer in problem.layers.items() if name not in inside]
        return together | {f"{p.in_features}→{p.out_features}{' DoRA' * p.case.dora}": p for p in alone}


def parse(text: str) -> tuple[str, ...]:
    """The peers of "peft,bnb", "none" or "all". Raises CommandError for an unknown name."""
    names = {"none": (), "all": PEERS}.get(text) or tuple(name.strip() for name in text.split(",") if text != "none")
    for name in names:
        if name not in PEERS:
            raise CommandError(f"--compare: got {name!r}, expected none, all, or some of {', '.join(PEERS)}")
    return names


def why_not(name: str, lorafusion: Path | None = None, quantize: str | None = None) -> str | None:
    """None if peer `name` is installed, otherwise the reason that it is not measured in this run."""
    if quantize:
        return why_not("bnb") if name in ("peft", "bnb") else "not measured over 4-bit weights; bnb is"
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


def require_rows(named: tuple[str, ...], result: dict[str, Any], quantize: str | None) -> None:
    """Raise CommandError for a peer that was named and is in no row of `result`, with the reason; rows are shown by then."""
    measured = {row["variant"] for row in result["rows"]}
    for name in named:
        built = "bnb" if quantize and name == "peft" else name
        if ROWS[built] not in measured:
            reason = next(row["reason"] for row in result["peers_not_measured"] if row["peer"] in (name, built))
            raise CommandError(f"--compare: {name} was not measured: {reason}", FAILED)


def why_not_here(name: str, case: Workload) -> str | None:
    """None if peer `name` has a path for `case`, otherwise the reason."""
    if case.dora and name in ("unsloth-style", "lorafusion"):
        return "it has no DoRA"
    if name == "unsloth-style" and case.p > 0 and case.passes == BOTH:
        return "its fused path has no dropout: it leaves this case to PEFT"
    return None


def variants(name: str, problem: BlockProblem, lorafusion: Path | None = None) -> list[Variant]:
    """The rows of peer `name`, or of "bare", "ours" or "ours-nf4", over `problem`'s tensors."""
    wide = None if problem.case.dtype == torch.float32 else problem.map(lambda layer: layer.with_adapters(torch.float32))
    if name == "bare":
        return [_variant(BARE, problem, peer_layers.frozen)]
    if name == "ours":
        layers = _ours(OURS, problem, peer_layers.ours) + (_ours(OURS_FP32, wide, peer_layers.ours) if wide else [])
        return layers + _beside_dora(OURS, problem, peer_layers.ours)
    if name == "peft":
        return [_variant(PEFT, problem, peer_layers.peft)] + ([_variant(PEFT_FP32, wide, peer_layers.peft)] if wide else [])
    if name == "peft-compile":
        torch._dynamo.reset()  # of other cases' shapes, which would count as recompilations
        eager = _variant(PEFT_COMPILED, problem, peer_layers.peft)
        return [replace(eager, module=torch.compile(eager.module, dynamic=False))]  # type: ignore[arg-type]
    if name == "unsloth-style":
        return [Variant(UNSLOTH, peer_layers.UnslothBlock(problem).train())]
    if name == "ours-nf4":
        four_bit = _ours(OURS_NF4, problem, peer_layers.ours_nf4) + _beside_dora(OURS_NF4, problem, peer_layers.ours_nf4)
        return [replace(variant, nf4=True) for variant in four_bit]
    if name == "bnb":
        return [_variant(BNB, problem, peer_layers.bnb)]
    kernels = _lorafusion(lorafusion)
    return [_variant(LORAFUSION, problem, lambda layer: peer_layers.LoRAFusionLinear(layer, kernels))]


def _variant(name: str, problem: BlockProblem, build: Callable[[Problem], nn.Module]) -> Variant:
    layers = {key: build(layer) for key, layer in problem.layers.items()}
    return Variant(name, Block(problem.case.shape.block, layers).train())


def _ours(name: str, problem: BlockProblem, build: Callable[[Problem], nn.Module]) -> list[Variant]:
    """This package's layers and, in a block, the same ones fused."""
    alone = replace(_variant(name, problem, build), ours=problem)
    kind = problem.case.shape.block
    if kind == "linear":
        return [alone]
    fused = peer_layers.FusedBlock(kind, dict(alone.module.layers)).train()  # type: ignore[arg-type]
    return [alone, replace(alone, name=name + FUSED, module=fused, fused=True)]


def _beside_dora(name: str, problem: BlockProblem, build: Callable[[Problem], nn.Module]) -> list[Variant]:
    """The same layer without its magnitude, where it has one."""
    return _ours(name + LORA, problem.map(Problem.without_magnitude), build) if problem.case.dora else []


def _missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"not installed; run `pip install {package}`"


def _lorafusion(folder: Path | None) -> ModuleType:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module("lorafusion.ops.lora_v1")
