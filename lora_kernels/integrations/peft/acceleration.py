"""Existing PEFT layers to and from this package's forward, by change of class; what was changed, and why the rest was not."""

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ...models.blocks import BlockReport, fuse_what_can_be, unfuse_blocks
from ...models.fused import UNCALLED, in_attention, why_fused
from ...models.names import grouped, parents
from ...models.wrappers import named_modules

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate` did; str() is for people.

    accelerated: paths of the layers that compute with these kernels. skipped: the other LoRA layers, and why not.
    falling_back: accelerated layers whose calls go to PEFT's forward as long as they are in their present state, whatever their
    input, and why.
    without_lora: modules with weights that are no linear layers (fused experts, nn.MultiheadAttention) and have no LoRA.
    blocks: which layers compute together as one operation (`fuse_blocks`); None with blocks=False.
    """

    model: nn.Module = field(repr=False)
    accelerated: list[str]
    skipped: dict[str, str]
    falling_back: dict[str, str]
    without_lora: dict[str, str] = field(default_factory=dict)
    blocks: BlockReport | None = None

    def calls(self) -> dict[str, int]:
        """Calls of the model's accelerated layers so far: how many were "fast", and for each reason how many were not.
        A layer that was computed as a part of a block is among the fast ones; `blocks.calls()` counts the blocks.

        Calls inside a graph of torch.compile are not counted: run the model once without it to see them.
        """
        from .linear import CALLS, FAST

        total = Counter({FAST: 0})
        for module in self.model.modules():
            total.update(vars(module).get(CALLS, {}))
        return dict(total)

    def __str__(self) -> str:
        reasons = Counter([*self.skipped.values(), *self.falling_back.values()])
        total = len(self.accelerated) + len(self.skipped)
        lines = [f"{total - reasons.total()} of {total} LoRA layers fast now"]
        lines[0] += ": " * bool(reasons) + "; ".join(f"{count} × {reason}" for reason, count in reasons.items())
        lines += [f"  not accelerated: {path}: {reason}" for path, reason in self.skipped.items()]
        lines += [f"  calls PEFT's forward at present: {path}: {reason}" for path, reason in self.falling_back.items()]
        lines += [f"  without LoRA: {line}" for line in grouped(self.without_lora)]
        if self.blocks is not None and (self.blocks.groups or self.blocks.mlps or self.blocks.skipped):
            lines += [f"  {line}" for line in str(self.blocks).splitlines()]
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(model: nn.Module, *, blocks: bool = True, dora_dropout: str = "peft") -> AccelerationReport:
    """Let every LoRA layer of `model`, a PeftModel or any tree of modules, compute with these kernels.

    Exactly peft.tuners.lora.Linear, lora.bnb.Linear4bit, lora.Conv2d and lora.Embedding, lora.ParamWrapper over transformers'
    experts (target_parameters, of which the outermost computes), and AdaLoRA's adalora.SVDLinear and adalora.bnb.SVDLinear4bit,
    change their class, to one that differs in `forward` alone: parameters, state dict keys, optimizers and PEFT's methods stay.
    A call that needs more than one plain LoRA adapter goes to PEFT's forward (`report.calls()` says how many, and why). Calling
    it again is allowed, and needed after layers were added.
    blocks: q, k and v, and whole MLPs, become one operation each (`fuse_blocks`); False lets every layer compute alone.
    dora_dropout: what lora_dropout means to DoRA in training. "peft": PEFT drops x in the base product too, y = x·Wᵀ +
    (m/n - 1)·drop(x)·Wᵀ + (m/n)·s·drop(x)·Aᵀ·Bᵀ + c, and its own forward computes that. "low_rank": y = (m/n) ⊙ (x·Wᵀ +
    s·drop(x)·Aᵀ·Bᵀ) + c, fast, another function. Without dropout, and in evaluation, both are fast and the same. n is float32
    where PEFT rounds it to the adapter's dtype; a row with n = 0 gives c, where PEFT gives NaN.

    accelerate's hooks that move or offload a layer's tensors run around the call; other hooks make it fall back.
    Warns where a layer's forward was replaced on the instance by something other than accelerate's hooks: that one still
    runs. Raises ImportError without peft, ValueError for a model without LoRA layers or another dora_dropout.
    """
    _check_dora_dropout(dora_dropout)
    from peft.tuners.lora import LoraLayer

    from .swap import swap, why_not_at_present

    accelerated: list[str] = []
    skipped: dict[str, str] = {}
    falling_back: dict[str, str] = {}
    without_lora: dict[str, str] = {}
    modules = dict(named_modules(model))
    for path, module in modules.items():
        if not isinstance(module, LoraLayer):
            inside = any(isinstance(modules[parent], LoraLayer) for parent in parents(path)[1:])
            if not inside and (weights := why_fused(module)) is not None:
                without_lora[path] = weights
            continue
        reason = UNCALLED if in_attention(path, modules) else swap(module, dora_dropout)
        if reason is not None:
            skipped[path] = reason
            continue
        accelerated.append(path)
        state = why_not_at_present(module)
        if state is not None:
            falling_back[path] = state
    if not accelerated and not skipped:
        raise ValueError(
            f"model: got a {type(model).__name__} without PEFT's LoRA layers, expected a PeftModel with a LoraConfig; "
            "call peft.get_peft_model first (a model changed by add_lora needs no acceleration)"
        )
    if not blocks:
        unfuse_blocks(model)
    fused = fuse_what_can_be(model) if blocks else None
    return AccelerationReport(model, accelerated, skipped, falling_back, without_lora, fused)


def restore(model: nn.Module) -> None:
    """PEFT's own classes again, and no fused blocks, as before `accelerate`; other layers are left alone."""
    from .swap import change_class, classes

    unfuse_blocks(model)
    accelerated = {ours: theirs for theirs, ours in classes().items()}
    for module in model.modules():
        if type(module) in accelerated:
            change_class(module, accelerated[type(module)])


def _check_dora_dropout(dora_dropout: str) -> None:
    if dora_dropout not in ("peft", "low_rank"):
        raise ValueError(f"dora_dropout: got {dora_dropout!r}, expected 'peft' or 'low_rank'")


def accelerated(config: "LoraConfig", *, dora_dropout: str = "peft") -> "LoraConfig":
    """`config` itself, whose models are created with accelerated layers: get_peft_model, from_pretrained(…, config=config).

    It stays valid for add_adapter, and is not saved with the adapter. dora_dropout: as in `accelerate`. Raises TypeError for
    anything but a LoraConfig, and for an AdaLoraConfig, of which PEFT makes its own layers whatever it says.
    """
    _check_dora_dropout(dora_dropout)
    from peft import AdaLoraConfig, LoraConfig

    if isinstance(config, AdaLoraConfig):
        raise TypeError("config: got AdaLoraConfig, expected a peft.LoraConfig; call accelerate(model) after get_peft_model")
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a peft.LoraConfig")
    config._register_custom_module({nn.Module: partial(_create, dora_dropout)})  # type: ignore[dict-item]
    return config


def _create(dora_dropout: str, target: nn.Module, adapter_name: str, config: "LoraConfig", **kwargs: Any) -> nn.Module:
    """The layer that PEFT itself makes of `target`, accelerated if it can be."""
    from peft.tuners.lora import LoraLayer, LoraModel

    from .swap import swap

    registered = config._custom_modules
    config._custom_modules = {kind: make for kind, make in (registered or {}).items() if kind is not nn.Module}
    try:
        layer = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
    finally:
        config._custom_modules = registered
    if isinstance(layer, LoraLayer):
        swap(layer, dora_dropout)
    return layer
